"""Which checkpoint a run goes on from, and whether its settings fit: decided before a model is built."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from miles.checkpoint_folder import NoCheckpointError, newest, same_folder, to_load
from miles.config.resume_rules import Change, Effect, changes, recorded
from miles.services.trainer.checkpoint.errors import MisfitError
from miles.services.trainer.checkpoint.record import CheckpointRecord

Say = Callable[[str], None]
"""Takes a sentence for people: the log and the job's history."""


def choose(own: pathlib.Path, load: pathlib.Path | None, say: Say) -> pathlib.Path | None:
    """Return the newest complete checkpoint of the run's own folder, else what `load` names; None for a fresh start.

    Says what it passes over. Raises NoCheckpointError rather than begin afresh where checkpoints were expected.
    """
    mine = newest(own)
    if mine.passed_over:
        say(f"passed over {mine.words()}")
    if mine.checkpoint is not None:
        if load is not None and load.exists() and not any(same_folder(load, each) for each in (own, mine.checkpoint)):
            say(f"going on from the run's own newest checkpoint, {mine.checkpoint}; load = {load} is for a first start")
        return mine.checkpoint
    if mine.damaged:
        remedy = "copy it again, or remove it to start from the beginning"
        raise NoCheckpointError(own, f"none is complete: {mine.words()}", remedy)
    if load is None:
        return None
    if same_folder(load, own):
        say(f"{load} holds no checkpoint yet: starting from the initial weights")
        return None
    found = to_load(load)
    if found.passed_over:
        say(f"passed over {found.words()}")
    return found.checkpoint


def check_settings(
    directory: pathlib.Path, record: CheckpointRecord, settings: Mapping[str, Any], backend: str, say: Say
) -> None:
    """Compare a checkpoint's settings with the run's (flat): say those that differ, refuse those that cannot.

    `backend` is the one that wrote the checkpoint. Raises MisfitError.
    """
    if backend != settings["train_backend"]:
        raise MisfitError(
            f"{directory} was saved with train_backend = {backend}, and {settings['train_backend']} cannot read it; "
            f"set train_backend to {backend}, or give an export of it (save_hf, or miles convert dist-to-hf for "
            "megatron) as hf_checkpoint"
        )
    found = changes(record.settings, json.loads(json.dumps(recorded(settings))))
    if refused := [change for change in found if change.effect is Effect.REFUSED]:
        raise MisfitError(
            f"{directory} was saved under other settings, on which its tensors depend: {_listed(refused)}; set these "
            "as they were, or start a new run from its export (save_hf) as hf_checkpoint"
        )
    if applied := [change for change in found if change.effect is Effect.APPLIED]:
        say(f"{directory} was saved under other settings; the new ones apply from here on: {_listed(applied)}")


def _listed(found: list[Change]) -> str:
    return ", ".join(map(str, found))
