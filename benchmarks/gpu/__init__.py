"""Benchmarks that need a GPU; each is one command that ends in a table."""
