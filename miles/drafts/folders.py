"""Where a run keeps what drafts are trained from and to; all in the run's folder unless configured otherwise."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.config import JobConfig


def recordings_dir(config: JobConfig) -> pathlib.Path:
    """Folder into which the trainer's ranks write recordings, and from which the draft trainer reads them."""
    given = config.drafts.draft_recordings_dir
    return drafts_dir(config) / "recordings" if given is None else pathlib.Path(given)


def checkpoint_dir(config: JobConfig) -> pathlib.Path:
    """Folder of the draft trainer's own checkpoint."""
    return drafts_dir(config) / "checkpoint"


def trained_dir(config: JobConfig) -> pathlib.Path:
    """Hugging Face folder of the draft model as it was trained last, for another run or another server."""
    return drafts_dir(config) / "trained"


def initial_dir(run_dir: str) -> pathlib.Path:
    """Hugging Face folder of an EAGLE-3 head that begins from nothing."""
    return pathlib.Path(run_dir) / "drafts" / "initial"


def drafts_dir(config: JobConfig) -> pathlib.Path:
    """Folder of all of it."""
    return pathlib.Path(config.services.run_dir) / "drafts"
