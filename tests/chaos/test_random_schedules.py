"""Services are killed at random moments, alone and together: every job ends, with every group trained once."""

from __future__ import annotations

import os
import pathlib

import pytest
from chaos_schedules import run_schedules
from chaos_stack import stack

SEEDS = "MILES_CHAOS_SEEDS"
"""Environment variable with the first and the last seed to run, e.g. 86-99."""
A_STACK = 25
"""Schedules that are run on one set of services."""


def wanted() -> list[range]:
    """The seeds to run, as many as one set of services takes at a time."""
    first, _, last = os.environ.get(SEEDS, "0-99").partition("-")
    seeds = range(int(first), int(last or first) + 1)
    return [seeds[i : i + A_STACK] for i in range(0, len(seeds), A_STACK)]


@pytest.mark.chaos
@pytest.mark.timeout(A_STACK * 240)
@pytest.mark.parametrize("seeds", wanted(), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
async def test_jobs_survive_many_random_kills(
    tiny_dense: pathlib.Path, tmp_path: pathlib.Path, pytestconfig: pytest.Config, seeds: range
) -> None:
    async with stack(tiny_dense, tmp_path) as services:
        await run_schedules(services, seeds, pytestconfig)
