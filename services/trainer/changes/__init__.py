"""Exports to rank 0 that gather only what changed since the last one. Start at `export`.

Every rank keeps its shards as they were exported last and compares before anything is gathered. Nothing here knows of
versions or transports: that rank 0 has what the other ranks have kept is all that has to hold.
"""
