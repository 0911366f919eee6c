"""What the system tells of itself: Prometheus metrics."""
