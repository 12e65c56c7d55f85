"""Neighborhood attention: the block-sparse kernels over tiles of a grid, with windows of coordinates."""
