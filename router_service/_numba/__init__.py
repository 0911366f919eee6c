"""Planning, compiled for this machine's CPU."""
