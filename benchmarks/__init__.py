"""Benchmarks: one file for each question. `python -m benchmarks NAME [--write]` prints a table."""
