"""The FSDP backend: Hugging Face models, sharded by FSDP2. Start at `backend`, then `model.build_roles`."""
