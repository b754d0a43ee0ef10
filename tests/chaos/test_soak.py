"""Jobs at random on one `miles serve` while its processes are killed and frozen: every invariant holds all the time."""

from __future__ import annotations

import os
import pathlib
import shutil

import pytest
from soak.driver import Soak
from soak.recipes import Places
from soak.records import Records
from soak.stack import SoakStack

MINUTES, SEED, FOLDER = "MILES_SOAK_MINUTES", "MILES_SOAK_SEED", "MILES_SOAK_DIR"
"""Environment variables: how long, which schedule, and where to leave what a failing soak needs to be understood."""
DEFAULT_MINUTES = 10.0

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]


def test_nothing_is_lost_and_nothing_is_silent(tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    minutes = float(os.environ.get(MINUTES, DEFAULT_MINUTES))
    seed = int(os.environ.get(SEED, "1"))
    folder = pathlib.Path(os.environ.get(FOLDER, tmp_path / "soak")).absolute()
    records = Records(folder)
    records.note("seed", seed=seed, minutes=minutes)
    broken = folder / "broken-model"
    shutil.copytree(tiny_dense / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with SoakStack(folder, (tiny_dense, folder), f"soak-{os.getpid()}") as stack:
        reward = f"127.0.0.1:{stack.reward_port}"
        places = Places(tiny_dense, broken, folder / "runs", folder / "prompts", reward)
        soak = Soak(stack, places, records, seed)
        report = soak.run(minutes)
    strikes = ", ".join(f"{count} × {what}" for what, count in soak.troubles.strikes.items())
    ends = ", ".join(f"{job.id} {job.state}" for job in soak.jobs.values())
    answers = ", ".join(f"{count} × {code}" for code, count in soak.rest.answers.items())
    text = f"seed {seed}, {minutes:g} minutes; {strikes}\nanswers: {answers}\njobs: {ends}\n\n{report}\n"
    (folder / "report.md").write_text(text)
    print(text)
    assert not records.violations, f"see {folder}:\n" + "\n".join(records.violations)
