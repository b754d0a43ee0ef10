"""Weights as chunks named by their content, through the weightsync service. Start at `transport`."""
