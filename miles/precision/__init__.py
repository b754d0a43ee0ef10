"""Number types: what a machine computes fast in, and what a run computes in. Knows no service and no model.

Start with `number_types`, the decision; `speed` measures what it decides by and is the only file that needs PyTorch.
"""
