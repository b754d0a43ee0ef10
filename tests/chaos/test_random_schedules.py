"""Services are killed at random moments, alone and together: every job ends, with every group trained once."""

from __future__ import annotations

import pathlib

import pytest

from .schedules import run_schedules
from .stack import stack

SCHEDULES, A_STACK = 100, 25


@pytest.mark.chaos
@pytest.mark.timeout(A_STACK * 240)
@pytest.mark.parametrize("first", range(0, SCHEDULES, A_STACK))
async def test_jobs_survive_many_random_kills(
    tiny_dense: pathlib.Path, tmp_path: pathlib.Path, pytestconfig: pytest.Config, first: int
) -> None:
    async with stack(tiny_dense, tmp_path) as services:
        await run_schedules(services, range(first, first + A_STACK), pytestconfig)
