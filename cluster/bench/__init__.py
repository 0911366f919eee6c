"""Benchmarks: what the command `expertmesh bench` measures."""
