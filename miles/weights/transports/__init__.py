"""One folder per weight transport, and what they share: `memory` (receive buffers) and `names` (configuration names).

Start at a folder's `transport`. `miles.weights.registry` lists the folders; nothing here imports it.
"""
