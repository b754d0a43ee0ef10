"""Rewards of the sorting task with several numbers, as a user's module has them."""

from __future__ import annotations

from miles.types import Sample


async def right_and_close(sample: Sample) -> dict[str, float]:
    """Whether the digits are sorted, and the share of them that are in their places."""
    label, response = sample.label or "", sample.response
    placed = sum(a == b for a, b in zip(label, response, strict=False)) / len(label)
    return {"right": float(response == label), "placed": placed}
