"""API keys in a file, which has only their hashes, each with a name and a scope.

A key is `mk_ID_SECRET` with 256 random bits. A secret of that length cannot be guessed from its SHA-256, so a slow
password hash would only slow down every request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fcntl
import hashlib
import hmac
import json
import logging
import os
import pathlib
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

logger = logging.getLogger(__name__)

_KEY = re.compile(r"mk_([0-9a-f]{8})_([\w-]{43})")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class Scope(enum.StrEnum):
    """What a key may do; each scope includes those before it."""

    READ = "read"
    """Read everything."""
    SUBMIT = "submit"
    """Submit jobs, and act on those it submitted."""
    ADMIN = "admin"
    """Act on every job."""

    def includes(self, other: Scope) -> bool:
        """Return whether this scope allows everything that `other` allows."""
        order = list(Scope)
        return order.index(self) >= order.index(other)


class KeyFileError(ValueError):
    """The file is not a valid key file."""


@dataclasses.dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, as stored in the file."""

    key_id: str
    name: str
    scope: Scope
    hash: str
    """SHA-256 of the key, in hexadecimal."""
    created_unix_s: int
    expires_unix_s: int | None = None

    def expired(self, now_unix_s: float) -> bool:
        """Return whether the key has expired."""
        return self.expires_unix_s is not None and now_unix_s >= self.expires_unix_s


class KeyFile:
    """A file of keys; readers see changes within a second."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[str, ApiKey] = {}
        self._looked_s = float("-inf")

    def verify(self, presented: str) -> ApiKey | None:
        """Return the key with this text, or None; also None while the file cannot be read."""
        match = _KEY.fullmatch(presented)
        if match is None:
            return None
        self._refresh()
        key = self._keys.get(match[1])
        # Also compare for an unknown id, so that the time does not reveal which ids exist.
        same = hmac.compare_digest(_hash(presented), key.hash if key else "0" * 64)
        return key if key is not None and same and not key.expired(time.time()) else None

    def list(self) -> list[ApiKey]:
        """Return every key, oldest first."""
        return sorted(_read(self._path).values(), key=lambda key: (key.created_unix_s, key.key_id))

    def create(self, name: str, scope: Scope, lifetime_s: float | None = None) -> tuple[ApiKey, str]:
        """Add a key; return it with its text, which is not stored. Raises ValueError for a name that is taken."""
        if not NAME.fullmatch(name):
            raise ValueError(f"name {name!r} must be letters, digits and ._@-, at most 64 of them")
        key_id = secrets.token_hex(4)
        text = f"mk_{key_id}_{secrets.token_urlsafe(32)}"
        now = int(time.time())
        expires = None if lifetime_s is None else now + int(lifetime_s)
        key = ApiKey(key_id, name, scope, _hash(text), now, expires)
        with self._changing() as keys:
            if any(other.name == name for other in keys.values()):
                raise ValueError(f"there is a key named {name!r}; revoke it first, or choose another name")
            keys[key_id] = key
        return key, text

    def revoke(self, name_or_id: str) -> ApiKey:
        """Remove a key. Raises KeyError when there is none."""
        with self._changing() as keys:
            found = next((key for key in keys.values() if name_or_id in (key.name, key.key_id)), None)
            if found is None:
                raise KeyError(name_or_id)
            del keys[found.key_id]
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked_s < 1.0:
            return
        self._looked_s = now
        try:
            state = self._path.stat()
            stamp = (state.st_ino, state.st_mtime_ns, state.st_size)
            if stamp != self._stamp:
                self._keys = _read(self._path)
                self._stamp = stamp
        except FileNotFoundError:
            self._stamp, self._keys = None, {}
        except (KeyFileError, OSError) as error:
            # No key stays valid: the change that broke the file may have revoked one.
            logger.error("no API key is valid until the file can be read: %s", error)
            self._stamp, self._keys = None, {}

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, ApiKey]]:
        """Yield the keys to change; write them back atomically, one process at a time."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(lock, "r+b"):
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = _read(self._path)
            yield keys
            _write(self._path, keys.values())
        self._looked_s = float("-inf")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: pathlib.Path) -> dict[str, ApiKey]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {entry["id"]: _from_json(entry) for entry in data["keys"]}
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, ValueError) as error:
        raise KeyFileError(f"{path} is not a file of keys ({error!r}); `miles keys create` makes one") from error


def _from_json(entry: dict[str, Any]) -> ApiKey:
    return ApiKey(
        key_id=str(entry["id"]),
        name=str(entry["name"]),
        scope=Scope(entry["scope"]),
        hash=str(entry["sha256"]),
        created_unix_s=int(entry["created_unix_s"]),
        expires_unix_s=None if entry.get("expires_unix_s") is None else int(entry["expires_unix_s"]),
    )


def _write(path: pathlib.Path, keys: Iterable[ApiKey]) -> None:
    entries = [
        {
            "id": key.key_id,
            "name": key.name,
            "scope": str(key.scope),
            "sha256": key.hash,
            "created_unix_s": key.created_unix_s,
            "expires_unix_s": key.expires_unix_s,
        }
        for key in keys
    ]
    partial = path.with_suffix(".tmp")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps({"keys": entries}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
