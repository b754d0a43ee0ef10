"""Long samples on their way to a training step: no process holds more than the formulas of `miles.memory` say."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.long_sequences import STAGES

TOKENS = {"attention": 4096}
OFTEN = ("queue", "ranks")
SLACK_BYTES = 12_000_000
"""Memory that an allocator keeps, and messages of a few kilobytes."""


@pytest.mark.parametrize(
    "stage", [stage if stage in OFTEN else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]
)
def test_no_process_holds_more_than_is_said(stage: str) -> None:
    command = [sys.executable, "-m", "benchmarks.long_sequences", "--inner", stage]
    command += ["--samples", "4", "--tokens", str(TOKENS.get(stage, 8192)), "--layers", "60", "--top-k", "8"]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows
    for row in rows:
        assert row["peak"] <= row["said"] + SLACK_BYTES, row
    if stage == "encode":  # what is measured is there
        assert rows[0]["peak"] > 0.9 * rows[0]["payload"]
