"""Fixtures of whole runs."""

from __future__ import annotations

from whole_runs import start_run, tiny_dense, tiny_moe

__all__ = ["start_run", "tiny_dense", "tiny_moe"]
