"""Replaces an export by a newer one: only files that an export of the same run wrote are ever deleted.

The new export is written beside it, to `.NAME.miles-partial`, and the old one steps aside, to `.NAME.miles-old`.
Files that somebody has put into the old one are carried over. What a crash leaves half done, the next export finishes.
"""

from __future__ import annotations

import os
import pathlib
import shutil

from miles.ownership.owner_file import NAME, FolderTakenError, marked_run, new_owner, read_owner, write_owner
from miles.ownership.place import Place, locate, locate_pattern
from miles.ownership.rules import Refusal, refusal


class ExportFolder:
    """The place of one export of the run in `run_dir`."""

    def __init__(self, directory: pathlib.Path, run_dir: pathlib.Path, pattern: str | None = None) -> None:
        """`pattern` is save_hf, which `directory` is made of. A link counts as the folder that it leads to."""
        self.folder = locate(directory).path
        self._pattern: Place = locate(directory) if pattern is None else locate_pattern(pattern)
        self._run_dir = run_dir
        self.partial = self.folder.with_name(f".{self.folder.name}.miles-partial")
        """Where the export is to be written."""
        self._old = self.folder.with_name(f".{self.folder.name}.miles-old")

    def prepare(self) -> None:
        """Make `partial`, new and empty. Raises FolderTakenError when the place is not the run's to write."""
        run = marked_run(self._run_dir)
        self._finish_interrupted(run.run)
        if (found := self._refusal(run.run)) is not None:
            raise FolderTakenError(f"the export is not written: {found.problem}; {found.remedy}")
        if self.partial.exists():
            self._require_own(self.partial, run.run)
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        write_owner(self.partial, new_owner("export", run.run, self._run_dir, run.job_id))

    def complete(self) -> None:
        """Put what was written to `partial` in its place."""
        run = marked_run(self._run_dir)
        written = tuple(sorted(name for name in os.listdir(self.partial) if name != NAME))
        write_owner(self.partial, new_owner("export", run.run, self._run_dir, run.job_id, written), replace=True)
        if self.folder.exists():
            self.folder.rename(self._old)
        self.partial.rename(self.folder)
        if self._old.exists():
            self._carry_over()

    def _refusal(self, run: str) -> Refusal | None:
        return refusal("export", self.folder, self._run_dir, pattern=self._pattern, run=run)

    def _finish_interrupted(self, run: str) -> None:
        if not self._old.exists():
            return
        self._require_own(self._old, run)
        if self.folder.exists():
            self._carry_over()
        else:
            self._old.rename(self.folder)

    def _require_own(self, folder: pathlib.Path, run: str) -> None:
        owner = read_owner(folder)
        if os.listdir(folder) and (owner is None or owner.run != run):
            raise FolderTakenError(f"{folder} is in the way of the export and was not made by this run; remove it")

    def _carry_over(self) -> None:
        """Move files that no export wrote from the old folder into the new one, and remove the old one."""
        owner = read_owner(self._old)
        mine = {NAME, *(os.listdir(self._old) if owner is None else owner.files)}
        for name in set(os.listdir(self._old)) - mine:
            target = self.folder / name
            (self._old / name).rename(target if not target.exists() else self.folder / f"{name}.kept")
        shutil.rmtree(self._old)
