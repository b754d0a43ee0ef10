"""Folders of versions on shared storage: named and removed here, written by trainers, read by engines.

Below the shared folder each instance of the service has its own, with a folder for each stream. As with files in shared
memory, the next instance that starts removes the leftovers of one that will not come back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil

from miles.services.weightsync.segments import PREFIX, OutOfMemory, remove_orphans, safe_name, take_lock

logger = logging.getLogger(__name__)

FULL_EVERY = 10
"""Default distance from one full version to the next, a count of versions."""

_REMOVED = ".removed-"


@dataclasses.dataclass(frozen=True, slots=True)
class Folder:
    """The folder of one version, and its name while it is being written."""

    path: pathlib.Path
    partial: pathlib.Path


class FolderStore:
    """The folders of one instance of the service; `root` is None when there is no shared storage."""

    def __init__(self, root: pathlib.Path | None, instance: str, state_dir: pathlib.Path | None) -> None:
        """Take the instance's lock and remove what dead instances left behind."""
        self.root = root
        self._freed: set[pathlib.Path] = set()
        """Folders of freed versions that are kept because a newer one is a change to them."""
        if root is None:
            return
        root.mkdir(parents=True, exist_ok=True)
        self._own = root / f"{PREFIX}{instance}-versions"
        self._lock_path = root / f"{PREFIX}{instance}.lock"
        self._lock = take_lock(self._lock_path, state_dir)
        self._own.mkdir(exist_ok=True)
        remove_orphans(root, self._lock_path)

    @property
    def probe(self) -> pathlib.Path:
        """A file that other processes read to find out whether they share the storage."""
        return self._lock_path

    def allocate(self, stream: str, number: int, publication_id: int, nbytes: int) -> Folder:
        """Name and create the folders of a version; OutOfMemory when the storage is full."""
        assert self.root is not None, "the choice of transport has excluded this"
        parent = self._own / safe_name(stream)
        parent.mkdir(parents=True, exist_ok=True)
        free = os.statvfs(parent)
        if free.f_bavail == 0:
            raise OutOfMemory(f"{self.root} is full; {nbytes} bytes may be needed: make room or choose another folder")
        path = parent / f"weight_v{number:06d}"
        if path.exists():  # of a version before a resume, and still needed
            path = parent / f"weight_v{number:06d}-{publication_id}"
        partial = parent / f".partial-{path.name}-{publication_id}"
        partial.mkdir()
        return Folder(path, partial)

    def chain(self, path: pathlib.Path) -> list[pathlib.Path]:
        """A folder and those that it is based on, the newest first, until one is missing or damaged."""
        found = [path]
        while (base := _base(found[-1])) is not None and base not in found and base.is_dir():
            found.append(base)
        return found

    def free(self, folder: Folder, live: set[pathlib.Path]) -> int:
        """Free a version and remove the folders that no path in `live` is based on; return the bytes removed."""
        removed = _remove(folder.partial)
        self._freed.add(folder.path)
        return removed + self._remove_unneeded(live)

    def remove_unknown(self, known: set[pathlib.Path], in_use: set[pathlib.Path]) -> None:
        """Remove this instance's folders that are neither known nor in use, nor the base of one that is."""
        if self.root is None:
            return
        needed = {path for each in known | in_use for path in self.chain(each)}
        for parent in self._own.iterdir():
            for path in parent.iterdir():
                if path not in needed:
                    logger.info("removing %s, which no version needs", path)
                    _remove(path)
        self._freed = needed - known

    def close(self, remove_all: bool) -> None:
        """Release the lock, and remove the folders if `remove_all`."""
        if self.root is None:
            return
        if remove_all:
            _remove(self._own)
            self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)

    def _remove_unneeded(self, live: set[pathlib.Path]) -> int:
        needed = {path for each in live for path in self.chain(each)}
        gone = self._freed - needed
        self._freed -= gone
        return sum(_remove(path) for path in gone)


def _base(path: pathlib.Path) -> pathlib.Path | None:
    """The folder that this one is a change to."""
    try:
        base = json.loads((path / "index.json").read_text())["base"]
        return None if base is None else path.parent / str(base["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # an engine that reads it will report the fault


def _remove(path: pathlib.Path) -> int:
    """Remove a folder for everyone at once, by renaming it first; return its bytes."""
    gone = path.with_name(_REMOVED + path.name)
    try:
        path.rename(gone)
    except FileNotFoundError:
        return 0
    size = 0
    for file in gone.rglob("*"):
        with contextlib.suppress(OSError):
            size += file.stat().st_size
    shutil.rmtree(gone, ignore_errors=True)
    return size
