"""Stands in for SGLang's kernels where there are none for the CPU: every function raises when it is called."""

from __future__ import annotations

from typing import Any

__version__ = "0.0.0+none"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} is not available in this installation")

    return missing
