"""The model of the torch engine: a Hugging Face model that computes packed rows over a KV cache by slots.

Start at `forward`.
"""
