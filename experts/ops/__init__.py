"""Expert arithmetic, one op or backend a file."""
