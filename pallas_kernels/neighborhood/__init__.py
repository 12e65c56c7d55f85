"""Neighborhood attention: small windows in one pass; others by the block-sparse kernels over tiles of a grid."""
