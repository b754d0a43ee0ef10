"""One training step on a rollout, the same for every backend: roles, log-probs, advantages, optimizer steps, samples
logged. It never touches gRPC or checkpoints. Start at `training_step`.
"""
