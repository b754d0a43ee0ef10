"""A policy of which only low-rank adapters are trained. Start at `adapter`."""
