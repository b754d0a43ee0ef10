"""Low-rank adapters (LoRA): how they are computed, merged, and kept on disk. Start at `lora`."""
