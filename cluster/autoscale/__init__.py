"""Autoscaling: what a group reports about itself, and policies that turn reports into replica counts."""
