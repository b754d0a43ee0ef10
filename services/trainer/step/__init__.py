"""One training step, whatever holds the model: roles, log-probs, advantages, optimizer steps, what is recorded.

Start at `training_step`.
"""
