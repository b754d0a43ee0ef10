"""What every backend's checkpoints have in common: the state and record in them, and when and how they are saved.

It never touches tensors; backends do. Start at `record`, then `manager`.
"""
