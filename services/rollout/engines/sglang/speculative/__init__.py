"""Speculative decoding: the draft model of the servers."""
