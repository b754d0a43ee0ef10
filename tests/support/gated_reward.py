"""A reward that waits for a file: holds a job where a test wants it. Served as a script, beside which the gate lies."""

from __future__ import annotations

import asyncio
import os
import pathlib

from miles.reward_sdk import reward, serve
from miles.types import Sample

GATE = "MILES_TEST_GATE"
"""Environment variable with the path of the gate, which is open while the file is there."""


@reward
async def gated(sample: Sample) -> float:
    """1 for a right answer, once the gate is open."""
    gate = pathlib.Path(os.environ[GATE])
    while not gate.exists():  # noqa: ASYNC110 (another process opens it)
        await asyncio.sleep(0.02)
    return float(sample.response == sample.label)


if __name__ == "__main__":
    serve()
