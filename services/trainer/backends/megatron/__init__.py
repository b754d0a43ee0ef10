"""The Megatron-Core training backend."""
