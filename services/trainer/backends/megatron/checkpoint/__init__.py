"""Checkpoints of Megatron-Core, which any layout can read, and Hugging Face folders written from them.

Start at `torch_dist`.
"""
