"""A soak from its folder to its report."""

from __future__ import annotations

import os
import pathlib
import shutil

from soak.driver import Soak
from soak.recipes import Places
from soak.records import Records
from soak.stack import SoakStack


def run_soak(tiny: pathlib.Path, folder: pathlib.Path, seed: int, minutes: float) -> list[str]:
    """Soak with the tiny model of a folder; return what did not hold. `folder` keeps everything, also the report."""
    records = Records(folder)
    records.note("seed", seed=seed, minutes=minutes)
    broken = folder / "broken-model"
    shutil.copytree(tiny / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with SoakStack(folder, (tiny, folder), f"soak-{os.getpid()}") as stack:
        reward = f"127.0.0.1:{stack.reward_port}"
        places = Places(tiny, broken, folder / "runs", folder / "prompts", reward)
        soak = Soak(stack, places, records, seed)
        figures = soak.run(minutes)
    report = f"Seed {seed}, {minutes:g} minutes.\n\n{_counts(soak)}\n\n{figures}\n"
    (folder / "report.md").write_text(report)
    print(report)
    return records.violations


def _counts(soak: Soak) -> str:
    strikes = ", ".join(f"{count} × {what}" for what, count in soak.troubles.strikes.items())
    answers = ", ".join(f"{count} × {code}" for code, count in soak.rest.answers.items())
    ends = "\n".join(f"- {job.id}: {job.state} after {job.steps} steps" for job in soak.jobs.values())
    return f"Strikes: {strikes}.\n\nAnswers: {answers}.\n\nJobs:\n\n{ends}"
