"""Weights in GPU memory that trainer and engines of one node share. Start at `transport`."""
