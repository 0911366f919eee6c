"""Expert compute: token rows sorted by expert in, weighted partial sums out. Imports nothing of ours."""
