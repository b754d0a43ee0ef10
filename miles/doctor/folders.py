"""Folders that the run writes to: rights, space, and the kind of file system."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Sequence

from miles.doctor.finding import Finding, fail, ok, warn
from miles.doctor.subject import Subject
from miles.memory.amount import Part, size
from miles.memory.disk import disk_part
from miles.memory.run import run_of

_NETWORK = ("nfs", "cifs", "smb", "fuse.sshfs", "9p", "lustre", "gpfs", "ceph", "beegfs", "afs")
_SPARE = 1 << 30
"""Free space below which a run without an estimate is at risk: its logs, queue and samples."""


@dataclasses.dataclass(frozen=True, slots=True)
class Folder:
    """Facts about one folder."""

    flag: str
    """The setting or variable that names it."""
    path: str
    existing: str
    """It, or its nearest parent that exists."""
    is_folder: bool
    writable: bool
    kind: str
    """Of the file system, as /proc/self/mountinfo names it."""
    options: frozenset[str]
    """Of the mount."""
    free: int
    free_inodes: int
    """-1 where the file system has no fixed number of them."""
    need: Part | None
    lasting: bool
    """Whether its files are results, which must outlive the container."""


def look(subject: Subject) -> Sequence[Folder]:
    """Measure every folder that the run writes to."""
    run = run_of(subject.settings)
    disk = None if run is None else disk_part(run)
    save, save_hf = subject.get("save"), subject.get("save_hf")
    deltas = subject.get("update_weight_disk_dir")
    found = [measure("--run-dir", str(subject.run_dir), disk if save is None else None, lasting=True)]
    if save is not None:
        found.append(measure("--save", save, disk, lasting=True))
    if save_hf is not None:
        found.append(measure("--save-hf", save_hf.partition("{")[0] or ".", lasting=True))
    if deltas is not None:
        found.append(measure("--update-weight-disk-dir", deltas))
    home = os.environ.get("HOME") or "/"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    own = (("HOME", home), ("TMPDIR", tempfile.gettempdir()), ("XDG_CACHE_HOME", cache))
    return [*found, *(measure(name, path) for name, path in own)]


def measure(flag: str, path: str, need: Part | None = None, *, lasting: bool = False) -> Folder:
    """Gather the facts about one folder."""
    absolute = pathlib.Path(path).absolute()
    existing = next(each for each in (absolute, *absolute.parents) if each.exists())
    kind, options = mount_of(existing.resolve(), pathlib.Path("/proc/self/mountinfo").read_text())
    measured = os.statvfs(existing)
    return Folder(
        flag,
        path,
        str(existing),
        existing.is_dir(),
        os.access(existing, os.W_OK | os.X_OK),
        kind,
        options,
        measured.f_bavail * measured.f_frsize,
        measured.f_favail if measured.f_files else -1,
        need,
        lasting,
    )


def judge(folders: Sequence[Folder]) -> list[Finding]:
    """Judge each folder: one finding for its worst trouble."""
    return [_unusable(folder) or _tight(folder) or _risky(folder) or _good(folder) for folder in folders]


def _unusable(folder: Folder) -> Finding | None:
    what, elsewhere = f"{folder.flag} {folder.path}", _elsewhere(folder)
    if not folder.is_folder:
        return fail(f"{what}: {folder.existing} is a file", elsewhere)
    if "ro" in folder.options:
        return fail(f"{what}: {folder.existing} is mounted read-only", elsewhere)
    if not folder.writable:
        return fail(f"{what}: this user may not write to {folder.existing}", f"chown it, or {elsewhere}")
    if folder.free_inodes == 0:
        return fail(f"{what}: its file system has no inode left for a file", f"remove files, or {elsewhere}")
    return None


def _tight(folder: Folder) -> Finding | None:
    if folder.need and folder.need.bytes > folder.free:
        less = f"{_elsewhere(folder)}, a larger --save-interval, or --no-save-optim"
        return fail(_described(folder), less)
    if folder.free < _SPARE:
        return warn(_described(folder), f"free some, or {_elsewhere(folder)}")
    return None


def _risky(folder: Folder) -> Finding | None:
    described, elsewhere = _described(folder), _elsewhere(folder)
    if folder.kind.startswith(_NETWORK) and folder.flag == "--run-dir":
        slow = f"{described}, a network file system: Redis' file and the run's locks are slow there, or fail"
        return warn(slow, "--run-dir on a local disk; checkpoints may stay: --save there")
    if folder.lasting and folder.kind in ("tmpfs", "ramfs"):
        return warn(f"{described}, which is memory: it is gone after a restart", elsewhere)
    if folder.lasting and folder.kind == "overlay":
        return warn(f"{described}, a container's own layer: it is gone with the container", "mount a volume there")
    if "noexec" in folder.options and folder.flag in ("TMPDIR", "XDG_CACHE_HOME"):
        return warn(f"{described}, mounted noexec, and kernels are compiled there", elsewhere)
    return None


def _good(folder: Folder) -> Finding:
    return ok(_described(folder))


def _described(folder: Folder) -> str:
    needed = f"; the run writes {folder.need}" if folder.need else ""
    return f"{folder.flag} {folder.path}: {size(folder.free)} free on {folder.kind}{needed}"


def _elsewhere(folder: Folder) -> str:
    return f"{folder.flag} DIR on a local disk" if folder.flag.startswith("--") else f"export {folder.flag}=DIR"


def mount_of(path: pathlib.Path, mountinfo: str) -> tuple[str, frozenset[str]]:
    """Return the kind of file system that holds a path, and the options of its mount; unknown when none does."""
    best, found = -1, ("unknown", frozenset[str]())
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        mounted = fields.split()
        point = pathlib.Path(mounted[4].replace("\\040", " "))
        if (path == point or point in path.parents) and len(point.parts) >= best:
            words = rest.split()
            best, found = len(point.parts), (words[0], frozenset([*mounted[5].split(","), *words[-1].split(",")]))
    return found
