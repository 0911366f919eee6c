"""Code that numba compiles."""
