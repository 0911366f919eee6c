"""Everything that numba and LLVM compile. No other package imports them."""
