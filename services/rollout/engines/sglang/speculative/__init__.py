"""Speculative decoding: the draft model of the servers. It never touches what the policy serves."""
