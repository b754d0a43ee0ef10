"""The file that says whose a folder is: `.miles-owner.json`.

A run is known by an id that its run folder keeps, so that the same run folder is the same run, over restarts, moves and
other Redis servers. The other folders that it writes name the same id.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import socket
import uuid
from typing import Literal, get_args

from miles.regular_files import open_to_read

NAME = ".miles-owner.json"
FORMAT = 1
_MAX_BYTES = 16 << 20
Kind = Literal["run", "checkpoints", "export", "services"]
WHAT: dict[str, str] = {
    "run": "the run folder of {}",
    "checkpoints": "the checkpoints of {}",
    "export": "an export of {}",
    "services": "the folder of services that run jobs",
}
"""Words for each kind of folder."""


class FolderTakenError(OSError):
    """A folder that the run may not write: somebody else's, or one with files that no run wrote."""


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """Whose a folder is."""

    kind: Kind
    run: str
    """Id of the run; that of its run folder."""
    run_dir: str
    """Its run folder when the file was written, for people."""
    job_id: str = ""
    since: str = ""
    """ISO 8601, UTC."""
    host: str = ""
    files: tuple[str, ...] = ()
    """Of an export: the names of the files that were written."""

    def __str__(self) -> str:
        job = f", job {self.job_id}" if self.job_id else ""
        what = WHAT[self.kind].format(f"the run in {self.run_dir}{job}")
        return f"{what} (since {self.since}, on {self.host})"


def new_owner(kind: Kind, run: str, run_dir: pathlib.Path, job_id: str = "", files: tuple[str, ...] = ()) -> Owner:
    """Return an owner from now on."""
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Owner(kind, run, str(run_dir.absolute()), job_id, since, socket.gethostname(), files)


def read_owner(folder: pathlib.Path) -> Owner | None:
    """Return whose a folder is; None when it does not say. Raises FolderTakenError when that cannot be read."""
    path = folder / NAME
    try:
        with open_to_read(path) as file:
            data = json.loads(file.read(_MAX_BYTES))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, and {FORMAT} is known")
        fields = {field.name: data[field.name] for field in dataclasses.fields(Owner) if field.name in data}
        owner = Owner(**fields | {"files": tuple(data.get("files", ()))})
        if owner.kind not in get_args(Kind):
            raise ValueError(f"its kind is {owner.kind!r}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{path} does not say whose the folder is ({type(error).__name__}: {error})"
        raise FolderTakenError(f"{problem}; choose another folder, or delete that file if it is yours") from error
    return owner


def write_owner(folder: pathlib.Path, owner: Owner, *, replace: bool = False) -> Owner:
    """Write the file, once: when another process was quicker, return the owner that it wrote."""
    path, partial = folder / NAME, folder / f"{NAME}.{uuid.uuid4().hex[:8]}"
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, **dataclasses.asdict(owner)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave an empty one
        if replace:
            partial.replace(path)
        elif not _appeared(partial, path):
            return read_owner(folder) or owner
    finally:
        partial.unlink(missing_ok=True)
    return owner


def _appeared(partial: pathlib.Path, path: pathlib.Path) -> bool:
    """Give a file its name unless that is taken; return whether it has it now."""
    try:
        os.link(partial, path)  # unlike a rename, it fails when the file exists
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        partial.replace(path)
    return True


def run_of(run_dir: pathlib.Path, job_id: str = "") -> Owner:
    """Return the owner of a run folder, which is made and marked when it is new, or a copy of another one.

    Raises FolderTakenError for a folder of another kind, and OSError when it cannot be made.
    """
    owner = read_owner(run_dir)
    if owner is None:
        run_dir.mkdir(parents=True, exist_ok=True)
        owner = write_owner(run_dir, new_owner("run", uuid.uuid4().hex, run_dir, job_id))
    elif is_copy(owner, run_dir):
        owner = write_owner(run_dir, new_owner("run", uuid.uuid4().hex, run_dir, job_id), replace=True)
    if owner.kind != "run":
        raise FolderTakenError(f"run_dir = {run_dir}, but that is {owner}; choose another run_dir")
    return owner


def marked_run(run_dir: pathlib.Path) -> Owner:
    """Do the same for a run that is under way: a folder that says whose it is stays as it is.

    Mounts of one folder elsewhere can look like copies of it, so only what begins a run gives a copy another id.
    """
    owner = read_owner(run_dir)
    return owner if owner is not None and owner.kind == "run" else run_of(run_dir)


def is_copy(owner: Owner, run_dir: pathlib.Path) -> bool:
    """Return whether a run folder was copied, with this file in it, from one that is still there: two runs, not one."""
    original = pathlib.Path(owner.run_dir)
    if owner.kind != "run" or not os.path.isdir(original) or original.samefile(run_dir):
        return False
    first = read_owner(original)
    return first is not None and first.run == owner.run


def mark_services(folder: pathlib.Path) -> None:
    """Mark a folder as that of services, so that no job takes it as its run folder; one that is marked stays so."""
    if read_owner(folder) is None:
        write_owner(folder, new_owner("services", uuid.uuid4().hex, folder))
