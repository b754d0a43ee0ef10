"""Fixtures of this folder's tests."""

from __future__ import annotations

from config_files import files

__all__ = ["files"]
