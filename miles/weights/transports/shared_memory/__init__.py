"""Weights through files in shared memory, which engines map. Start at `transport`."""
