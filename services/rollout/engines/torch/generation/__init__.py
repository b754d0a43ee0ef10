"""Continuous batching: which request computes what next, and which token it gets.

The scheduler and sampling know no model. Start at `generator`.
"""
