"""The model of the torch engine: a Hugging Face model that computes packed rows over a KV cache of slots.

Nothing here decides what is computed. Start at `forward`.
"""
