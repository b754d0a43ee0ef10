"""Copies between device and host memory through a few pinned buffers. Start at `ring`."""
