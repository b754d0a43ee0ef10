"""Products of low-precision numbers, computed in float32 or bfloat16 from matrices and inputs that are rounded first.

What the formats' own kernels compute, up to the order of sums, on any device. The torch engine and the fsdp trainer
compute with the same modules, so that their log-probabilities are equal to the bit where those of unrounded models are.
Start at `model`.
"""
