"""The trainer: policy, reference and critic, the training step, checkpoints, and the export of weights.

It talks to engines about weights only. Start at `service`, then `job`, then `step.training_step`.
"""
