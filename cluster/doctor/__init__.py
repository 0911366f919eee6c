"""Looks for what would keep a model from being served, before it is tried. One check a file."""
