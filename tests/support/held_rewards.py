"""A reward service that holds a job in the steps that a test names, until it has seen what it waits for.

Who pauses a job after polling for a step may find it some steps further on a busy machine, or at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from miles.reward_sdk import Source, start_reward_server
from miles.services.reward.exact_match import exact_match
from miles.types import Sample

HELD = "MILES_TEST_HELD"
"""Environment variable with a folder: a file in it holds the step of its name."""


async def threes(sample: Sample) -> float:
    """`share_of_threes`, once the step is not held."""
    from benchmarks.draft_drift import share_of_threes  # which imports much, and only workers need it

    await _released(sample)
    return await share_of_threes(sample)


async def exact(sample: Sample) -> float:
    """`exact_match`, once the step is not held."""
    await _released(sample)
    return exact_match(sample)


async def _released(sample: Sample) -> None:
    """Where steps wait for each other, the version that has generated a response is the number of its step."""
    held = pathlib.Path(os.environ[HELD]) / str(sample.oldest_version)
    while held.exists():  # noqa: ASYNC110 (another process removes it)
        await asyncio.sleep(0.1)


class HeldRewards:
    """Steps, from 0, whose responses get no rewards before they are released."""

    def __init__(self, folder: pathlib.Path, address: str) -> None:
        self._folder = folder
        self.settings: Mapping[str, Any] = {
            "rm_type": None,
            "custom_rm_path": None,
            "reward_service": [f"default={address}"],
            "reward_timeout_s": 800.0,
        }
        """Of a job that can be held."""

    def hold(self, *steps: int) -> None:
        """Hold these steps from now on."""
        for step in steps:
            (self._folder / str(step)).touch()

    def release(self, step: int) -> None:
        """Give the responses of a step their rewards."""
        (self._folder / str(step)).unlink()


@contextlib.contextmanager
def held_rewards(folder: pathlib.Path, name: str) -> Iterator[HeldRewards]:
    """Serve one of the rewards above; `folder` is there already, and empty."""
    from weightsync_processes import Lines

    environment = {HELD: str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = Lines([__file__, name], environment=environment)
    try:
        address = process.wait_for(lambda line: line.startswith("listening on "), "address").split()[-1]
        yield HeldRewards(folder, address)
    finally:
        process.process.terminate()
        process.process.wait()


async def _serve(name: str) -> None:
    module = pathlib.Path(__file__).stem
    async with start_reward_server([Source(f"{module}.{name}")], "127.0.0.1:0", workers=1) as (address, _):
        print(f"listening on {address}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    from miles.rpc import main

    main(lambda: _serve(sys.argv[1]))
