"""Amounts of memory and disk, with the formulas that give them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

GIB = 1 << 30


class When(enum.StrEnum):
    """During which part of a step something takes memory."""

    ALWAYS = "always"
    LOADING = "loading"
    """Before the first step."""
    TRAINING = "training"
    GENERATING = "generating"


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What one thing takes in the memory of a device, in host memory, or on disk."""

    name: str
    bytes: int
    formula: str
    when: When = When.ALWAYS

    def __str__(self) -> str:
        return f"about {size(self.bytes)} ({self.formula})"


def peak(parts: Sequence[Part]) -> int:
    """Return the most bytes that parts take at once: loading, training and generation take turns."""

    def during(when: When) -> int:
        return sum(part.bytes for part in parts if part.when in (When.ALWAYS, when))

    return max(map(during, When))


def size(count: float) -> str:
    """Format a number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def number(count: float) -> str:
    """Format a number of parameters or tokens for people, as 7.24B or 31.2M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.4g}{unit}" if count >= 1e11 else f"{count / limit:.3g}{unit}"
    return f"{count:.0f}"
