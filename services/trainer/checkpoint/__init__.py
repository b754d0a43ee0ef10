"""What every backend's checkpoints have in common: the record, the state of what is on disk, saves in the background.

Start at `record`.
"""
