"""Megatron-Core models built from Hugging Face checkpoints by megatron-bridge. Start at `build_roles`."""
