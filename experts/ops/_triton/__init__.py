"""Everything that is compiled by Triton. No other package imports `triton`."""
