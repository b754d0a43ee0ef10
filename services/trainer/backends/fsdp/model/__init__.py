"""Hugging Face models under FSDP2: how they are built, and one micro-batch through them. Start at `build_roles`."""
