"""Filters of scored groups."""
