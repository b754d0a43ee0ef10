"""The trainer: policy, reference and critic, the training step, checkpoints, and the export of weights.

It talks to engines about weights alone. Start at `service`, then `step.training_step`.
"""
