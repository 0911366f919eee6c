"""Everything of the experts' that numba and LLVM compile."""
