"""Jobs at random on one `miles serve` while its processes are killed and frozen: every invariant holds all the time."""

from __future__ import annotations

import os
import pathlib

import pytest
from soak.run import run_soak

MINUTES, SEED, FOLDER = "MILES_SOAK_MINUTES", "MILES_SOAK_SEED", "MILES_SOAK_DIR"
"""Environment variables: how long, which schedule, and where to leave what a failing soak needs to be understood."""
DEFAULT_MINUTES = 10.0

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]


def test_nothing_is_lost_and_nothing_is_silent(tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    minutes, seed = float(os.environ.get(MINUTES, DEFAULT_MINUTES)), int(os.environ.get(SEED, "1"))
    folder = pathlib.Path(os.environ.get(FOLDER, tmp_path / "soak")).absolute()
    violations = run_soak(tiny_dense, folder, seed, minutes)
    assert not violations, f"see {folder}:\n" + "\n".join(violations)
