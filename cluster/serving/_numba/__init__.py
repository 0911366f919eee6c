"""What a decoder layer does beside its MLP, compiled for this machine's CPU."""

from experts.ops._numba.object_cache import remember_sources

remember_sources(__file__)
