"""Attention of images that is not query-key-value: gates computed from the image itself."""
