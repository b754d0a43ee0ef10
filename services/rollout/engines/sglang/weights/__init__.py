"""New weights into SGLang servers: as tensors, as files, or by the trainer's broadcast.

Nothing here decides when to update or which requests run. Start at `loader`.
"""
