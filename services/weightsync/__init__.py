"""Versions of the weights: which are prepared, which engine holds which, when bytes are freed.

It never converts weights. Start at `service`, then `publication`.
"""
