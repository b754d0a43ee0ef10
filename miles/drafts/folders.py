"""Where a run keeps what drafts are trained from and to, in the run's folder; recordings may be elsewhere."""

from __future__ import annotations

import pathlib


def checkpoint_dir(run_dir: pathlib.Path) -> pathlib.Path:
    """Folder of the draft trainer's own checkpoint."""
    return run_dir / "drafts" / "checkpoint"


def trained_dir(run_dir: pathlib.Path) -> pathlib.Path:
    """Hugging Face folder of the draft model as it was trained last, for another run or another server."""
    return run_dir / "drafts" / "trained"


def initial_dir(run_dir: pathlib.Path) -> pathlib.Path:
    """Hugging Face folder of an EAGLE-3 head that begins from nothing."""
    return run_dir / "drafts" / "initial"
