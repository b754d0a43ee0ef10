"""Number types: which ones a machine is fast in, and which ones a run uses.

It knows no service and no model. Start at `number_types`, the decision; `speed` measures, and alone needs PyTorch.
"""
