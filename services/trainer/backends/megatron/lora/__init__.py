"""Adapters (LoRA) of a Megatron-Core model. Start at `adapter`."""
