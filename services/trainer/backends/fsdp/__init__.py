"""FSDP2 over Hugging Face models."""
