"""Whether a run may write a folder: the one answer for the command line, the controller and the trainer."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

from miles.ownership.contents import (
    owned_above,
    strange_in_checkpoints,
    strange_in_export,
    strange_in_run_dir,
)
from miles.ownership.owner_file import NAME, Kind, Owner, is_copy, read_owner
from miles.ownership.place import STEP, Place, locate_pattern


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Why a folder is not the run's to write, and the way out."""

    problem: str
    remedy: str


def refusal(
    kind: Kind,
    folder: pathlib.Path,
    run_dir: pathlib.Path,
    load: str | None = None,
    pattern: Place | None = None,
    run: str | None = None,
) -> Refusal | None:
    """Return why the run of `run_dir` may not write a folder; None when it may.

    Args:
        kind: what the folder is to be. "export" stands for one that is replaced as a whole.
        folder: without links.
        run_dir: the run folder, which may not exist yet.
        load: the folder that the run loads from: one of checkpoints that it names may be taken over.
        pattern: of an export, the place that `folder` is one of.
        run: id of the run, where it is known; otherwise that of the run folder, unless that is a copy of another's.

    Raises FolderTakenError for an owner file that cannot be read, and OSError for a folder that cannot.
    """
    if folder.exists() and not folder.is_dir():
        return Refusal(f"{folder} is not a folder", "choose another place")
    mine = run or _run(run_dir)
    if (above := _foreign_above(folder, mine)) is not None:
        return above
    owner = read_owner(folder)
    if owner is None:
        strange = _strange(kind, folder, run_dir, pattern)
        if not strange:
            return None
        return Refusal(f"{folder}: {strange}", "choose a folder that is empty or does not exist yet")
    if kind == "run" and owner.kind == "run":
        return None  # the same run folder is the same run
    if kind == "checkpoints" and (owner.run == mine and owner.kind in ("run", kind)):
        return None
    if kind == "checkpoints" and owner.kind == kind and load is not None and _named_by(load, folder):
        return None
    if kind == owner.kind == "export" and owner.run == mine:
        return None
    return Refusal(f"{folder} is {owner}", _way_out(kind, owner, folder))


def export_refusal(pattern: str, run_dir: pathlib.Path) -> Refusal | None:
    """Do the same for every existing folder that save_hf stands for. Raises ValueError as `locate_pattern` does."""
    place = locate_pattern(pattern)
    for folder in existing(place):
        if (found := refusal("export", folder, run_dir, pattern=place)) is not None:
            return found
    return _foreign_above(place.path, _run(run_dir))


def existing(place: Place) -> list[pathlib.Path]:
    """Return the folders and files that exist of those that a place with STEP in it stands for."""
    found = [pathlib.Path(place.path.anchor)]
    for part in place.path.parts[1:]:
        if STEP not in part:
            found = [folder / part for folder in found]
            continue
        named = re.compile(step_expression(part))
        names = [(folder, name) for folder in found if folder.is_dir() for name in os.listdir(folder)]
        found = [folder / name for folder, name in names if named.fullmatch(name)]
    return sorted(folder for folder in found if folder.exists())


def step_expression(path: str | pathlib.Path) -> str:
    """Return a regular expression for a path in which STEP stands for any step."""
    return r"\d+".join(map(re.escape, str(path).split(STEP)))


def _way_out(kind: Kind, owner: Owner, folder: pathlib.Path) -> str:
    if kind == owner.kind == "checkpoints":
        return (
            "choose another folder, set load to it to go on from its checkpoints, or delete "
            f"{folder / NAME} to give it to this run"
        )
    return "choose another folder, or remove this one" if kind == owner.kind else "choose another folder"


def _run(run_dir: pathlib.Path) -> str | None:
    owner = read_owner(run_dir)
    return None if owner is None or is_copy(owner, run_dir) else owner.run


def _strange(kind: Kind, folder: pathlib.Path, run_dir: pathlib.Path, pattern: Place | None) -> str:
    if kind == "export":
        return strange_in_export(folder, run_dir, None if pattern is None else step_expression(pattern.path))
    if kind == "checkpoints" and folder != pathlib.Path(os.path.realpath(run_dir)):
        return strange_in_checkpoints(folder)
    return strange_in_run_dir(folder)


def _foreign_above(folder: pathlib.Path, mine: str | None) -> Refusal | None:
    """A folder inside of another run's: that one may write over it."""
    for parent in owned_above(folder):
        owner: Owner | None = read_owner(parent)
        if owner is not None and owner.kind != "services" and owner.run != mine:
            return Refusal(f"it lies in {parent}, which is {owner}", "choose a folder outside of it")
    return None


def _named_by(load: str, folder: pathlib.Path) -> bool:
    loaded = pathlib.Path(os.path.realpath(load))
    return loaded == folder or loaded.parent == folder
