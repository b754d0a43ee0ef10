"""Weights through folders on shared storage, as changes from an earlier version. Start at `transport`."""
