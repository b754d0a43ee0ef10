"""The Megatron-Core backend, for models that need more than sharding. Start at `backend`, then `model.build_roles`."""
