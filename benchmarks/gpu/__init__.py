"""Benchmarks that need a GPU; each is one command that prints a table."""
