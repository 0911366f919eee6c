"""Planning, compiled for this machine's CPU."""

from experts.ops._numba.object_cache import remember_sources

SOURCES = remember_sources(__file__)
