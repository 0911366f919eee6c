"""One command of `expertmesh` a file; `cluster.cli` lists them."""
