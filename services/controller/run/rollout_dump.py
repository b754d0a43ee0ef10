"""Writes the samples of each rollout to a file before they are trained on, as --save-debug-rollout-data asks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles.rollout_dumps.files import write_rollout
from miles.rollout_dumps.names import rollout_path
from miles.services.controller.run.queued_groups import queued_groups

if TYPE_CHECKING:
    from miles.config.sections.debug import DebugConfig
    from miles.queue import GroupQueue

_LINKED = ("metrics.jsonl", "samples", "traces")
"""What a run keeps in its own folder, and dump_details has links to."""


class RolloutDump:
    """The files of one run; without a template it writes nothing."""

    def __init__(self, config: DebugConfig, queue: GroupQueue, run_dir: pathlib.Path) -> None:
        self._template = config.save_debug_rollout_data
        self._queue = queue
        self._details = None if config.dump_details is None else pathlib.Path(config.dump_details)
        self._run_dir = run_dir

    async def write(self, step: int, group_ids: Sequence[int]) -> None:
        """Write the groups of a step. Raises OSError."""
        if self._details is not None:
            await asyncio.to_thread(_link, self._details, self._run_dir)
        if self._template is None:
            return
        groups = await queued_groups(self._queue, group_ids)
        await asyncio.to_thread(write_rollout, rollout_path(self._template, step), groups)


def _link(folder: pathlib.Path, run_dir: pathlib.Path) -> None:
    """Link to what the run keeps elsewhere; links of an earlier run are replaced, and files of others are left."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _LINKED:
        link, target = folder / name, (run_dir / name).resolve()
        if not target.exists():  # not yet, or in this run never
            continue
        if link.is_symlink() and link.readlink() != target:
            link.unlink()
        with contextlib.suppress(FileExistsError):
            os.symlink(target, link)
