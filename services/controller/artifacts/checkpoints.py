"""Finds and reads the checkpoints of a job on disk."""

from __future__ import annotations

import contextlib
import glob
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from miles.checkpoint_folder import RECORD_FILE, step_of
from miles.ownership import owner_file
from miles.ownership.place import STEP, stepless
from miles.rpc.gen import records_pb2
from miles.services.controller.errors import NotFoundError

CHUNK_BYTES = 1 << 20
_EXPORT_RECORD = "config.json"


class UnknownFileError(NotFoundError):
    """The checkpoint has no such file."""

    def __init__(self, step: int, name: str) -> None:
        super().__init__(f"step {step} of this job has no file {name!r}; list its checkpoints")


class CheckpointFiles:
    """Finds the checkpoints that a job's trainer has written."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings` is the job's flat configuration."""
        run_dir = pathlib.Path(settings["run_dir"])
        self._states = pathlib.Path(settings.get("save") or run_dir / "checkpoints")
        save_hf = settings.get("save_hf")
        self._export_template = stepless(save_hf) if save_hf else str(run_dir / "hf" / STEP)

    def find(self) -> list[records_pb2.Checkpoint]:
        """Return every checkpoint, newest first."""
        found: dict[int, records_pb2.Checkpoint] = {}
        for step, folder in self._state_folders():
            with contextlib.suppress(FileNotFoundError):  # the trainer has deleted it in the meantime
                state_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                saved = (folder / RECORD_FILE).stat().st_mtime_ns
                found[step] = records_pb2.Checkpoint(step=step, state_bytes=state_bytes, saved_unix_ns=saved)
        for step, folder in self._export_folders():
            checkpoint = found.setdefault(step, records_pb2.Checkpoint(step=step))
            checkpoint.hf_files.extend(_files(folder))
            written = (folder / _EXPORT_RECORD).stat().st_mtime_ns
            checkpoint.saved_unix_ns = max(checkpoint.saved_unix_ns, written)
        return [found[step] for step in sorted(found, reverse=True)]

    def open_export(self, step: int, name: str, offset: int) -> Iterator[bytes]:
        """Yield one exported file from an offset on, in pieces. Raises UnknownFileError before the first piece."""
        folder = dict(self._export_folders()).get(step)
        if folder is None or name not in {file.name for file in _files(folder)}:
            raise UnknownFileError(step, name)
        return _pieces(folder / name, offset)

    def _state_folders(self) -> Iterator[tuple[int, pathlib.Path]]:
        if not self._states.is_dir():
            return
        for path in self._states.iterdir():
            step = step_of(path)
            if step is not None and (path / RECORD_FILE).is_file():
                yield step, path

    def _export_folders(self) -> Iterator[tuple[int, pathlib.Path]]:
        parts = self._export_template.split(STEP)
        if len(parts) == 1:
            return  # every export replaces the one before; its step is not written anywhere
        pattern = "*".join(glob.escape(part) for part in parts)
        first, *others = (re.escape(part) for part in parts)
        named = re.compile(rf"{first}(?P<step>\d+){'(?P=step)'.join(others)}")
        for path in glob.iglob(pattern):
            match = named.fullmatch(path)
            # A link may lead anywhere, and no trainer makes one.
            if match and not pathlib.Path(path).is_symlink() and pathlib.Path(path, _EXPORT_RECORD).is_file():
                yield int(match["step"]), pathlib.Path(path)


def _files(folder: pathlib.Path) -> list[records_pb2.ExportFile]:
    return [
        records_pb2.ExportFile(name=path.name, size_bytes=path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.is_symlink() and path.name != owner_file.NAME
    ]


def _pieces(path: pathlib.Path, offset: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(CHUNK_BYTES):
            yield piece
