"""Files in shared memory that hold the versions' bytes: created here, written by trainers, mapped by engines.

Every file's name begins with the instance that created it. The instance locks `<prefix><instance>.lock` while it lives,
and the lock file names its state folder. An instance that starts removes the files of one that will not come back: its
lock is free, and its state folder is gone or never existed, or nothing has been written for a day.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import tempfile
import time
import zlib

logger = logging.getLogger(__name__)

PREFIX = "miles-weights-"
_PAGE = 4096
_ABANDONED_S = 86_400.0
"""How long the files of a killed run that is not resumed are kept, in seconds."""


class OutOfMemory(OSError):
    """There is no room for a version's bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """One file."""

    path: pathlib.Path
    nbytes: int
    """Size of the file, in bytes; at least what was requested."""


def default_directory() -> pathlib.Path:
    """Shared memory where the system has it, else the folder for temporary files (slower: it may be on a disk)."""
    shared = pathlib.Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK):
        return shared
    return pathlib.Path(tempfile.gettempdir())


class SegmentStore:
    """The files of one instance of the service."""

    def __init__(self, directory: pathlib.Path, instance: str, state_dir: pathlib.Path | None) -> None:
        """Take the instance's lock and remove what dead instances left behind."""
        self.directory = directory
        self._prefix = f"{PREFIX}{instance}-"
        self._spare: dict[str, Segment] = {}
        self._lock_path = directory / f"{PREFIX}{instance}.lock"
        self._lock = take_lock(self._lock_path, state_dir)
        remove_orphans(directory, self._lock_path)

    @property
    def probe(self) -> pathlib.Path:
        """A file that other processes read to find out whether they share this memory."""
        return self._lock_path

    def allocate(self, stream: str, number: int, publication_id: int, nbytes: int) -> Segment:
        """Create a file of at least nbytes with every page reserved; raises OutOfMemory.

        It may be the stream's spare file under a new name, whose pages are already in memory: writing to it costs no
        page faults.
        """
        size = -(-nbytes // _PAGE) * _PAGE
        path = self.directory / f"{self._prefix}{safe_name(stream)}-v{number}-{publication_id}"
        spare = self._spare.pop(stream, None)
        if spare is not None and spare.nbytes == size and spare.path.exists():
            spare.path.rename(path)
            return Segment(path, size)
        if spare is not None:
            spare.path.unlink(missing_ok=True)
        self._reserve(path, size)
        return Segment(path, size)

    def free(self, stream: str, segment: Segment, reusable: bool) -> None:
        """Remove a file, or keep it as the stream's spare if nobody maps it any more."""
        if reusable and stream not in self._spare and segment.path.exists():
            self._spare[stream] = segment
        else:
            segment.path.unlink(missing_ok=True)

    def free_spare(self, stream: str) -> int:
        """Remove the stream's spare, if any; return its bytes."""
        spare = self._spare.pop(stream, None)
        if spare is None:
            return 0
        spare.path.unlink(missing_ok=True)
        return spare.nbytes

    def remove_unknown(self, known: set[pathlib.Path]) -> None:
        """Remove this instance's files that are not in the restored state."""
        for path in self.directory.glob(f"{self._prefix}*"):
            if path not in known:
                logger.info("removing %s, left behind by an earlier run of this instance", path)
                path.unlink(missing_ok=True)

    def close(self, remove_all: bool) -> None:
        """Remove the spares, and all other files if `remove_all`; release the lock."""
        for stream in list(self._spare):
            self.free_spare(stream)
        if remove_all:
            self.remove_unknown(set())
            self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)

    def _reserve(self, path: pathlib.Path, size: int) -> None:
        """Create a file and reserve its pages, so that writing to it cannot run out of memory."""
        free = os.statvfs(self.directory)
        available = free.f_bavail * free.f_frsize
        advice = f"make {self.directory} larger (in a container: --shm-size), or choose another folder with --directory"
        if available < size:
            raise OutOfMemory(f"{path.name} needs {size} bytes; {self.directory} has {available} free: {advice}")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            path.unlink()
            raise OutOfMemory(f"{path.name} needs {size} bytes; {error.strerror}: {advice}") from error
        finally:
            os.close(fd)


def safe_name(stream: str) -> str:
    """A stream's key as a part of a file name; distinct keys stay distinct."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", stream)[:120]
    return safe if safe == stream else f"{safe}-{zlib.crc32(stream.encode()):08x}"


def take_lock(path: pathlib.Path, state_dir: pathlib.Path | None) -> int:
    """Open and lock an instance's lock file, and write into it what other instances need to know about this one."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise RuntimeError(
            f"another weightsync service runs with the same state ({path} is locked); stop it"
        ) from error
    os.ftruncate(fd, 0)
    content = {"state_dir": None if state_dir is None else str(state_dir), "token": secrets.token_hex(16)}
    os.pwrite(fd, json.dumps(content).encode(), 0)
    return fd


def remove_orphans(directory: pathlib.Path, own_lock: pathlib.Path) -> None:
    """Remove the files of instances that are dead and will not come back."""
    for lock_path in directory.glob(f"{PREFIX}*.lock"):
        if lock_path == own_lock:
            continue
        with contextlib.suppress(PermissionError, FileNotFoundError, BlockingIOError):
            # Of another user, removed already, or of a live instance.
            fd = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                files = list(directory.glob(f"{lock_path.name.removesuffix('.lock')}-*"))
                idle_s = time.time() - max(path.stat().st_mtime for path in (lock_path, *files))
                if idle_s < _ABANDONED_S and _can_come_back(os.pread(fd, 65536, 0)):
                    continue
                for path in files:
                    logger.info("removing %s, left behind by a dead instance", path)
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)
                lock_path.unlink(missing_ok=True)
            finally:
                os.close(fd)


def _can_come_back(content: bytes) -> bool:
    try:
        state_dir = json.loads(content)["state_dir"]
    except (ValueError, KeyError, TypeError):
        return True  # being written right now, or of another format
    return state_dir is not None and pathlib.Path(state_dir).exists()
