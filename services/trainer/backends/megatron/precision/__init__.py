"""Layers that compute in few bits: TransformerEngine's own kernels, or products of numbers rounded by our formats.

`choice` says which of the two, `matrices` where the matrices of the Hugging Face checkpoint lie in Megatron-Core's
parameters, `rounded_layers` has the layers that round, `covered` tells each what to do, and `kernels` has what
TransformerEngine needs.
"""
