"""Attention over a packed micro-batch of Hugging Face models. Start at `packed_attention`."""
