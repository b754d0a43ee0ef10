"""The state that survives a restart of the service, in one SQLite file; every write is atomic."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sqlite3
import uuid
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS instance (name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS stream (key TEXT PRIMARY KEY, state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS holding (
    key TEXT, publication_id INTEGER, path TEXT NOT NULL, nbytes INTEGER NOT NULL, fixed INTEGER NOT NULL,
    version BLOB NOT NULL, handles BLOB NOT NULL, manifest BLOB, PRIMARY KEY (key, publication_id)
);
"""


@dataclasses.dataclass(frozen=True, slots=True)
class HoldingRecord:
    """Where one publication's bytes are, as stored."""

    path: str
    """File in shared memory; empty when there is none."""
    nbytes: int
    """Size of that file, in bytes."""
    fixed: bool
    """Whether engines must use the transport that the trainer used."""
    version: bytes
    """Serialized policy_pb2.WeightVersion."""
    handles: bytes
    """Serialized weightsync_pb2.AllocateResponse."""
    manifest: bytes | None
    """Serialized policy_pb2.Manifest; None before PREPARED."""


class StateStore:
    """Stores each stream's state as JSON, and where the bytes of each publication are."""

    def __init__(self, state_dir: pathlib.Path | None) -> None:
        """`state_dir` None keeps everything in memory only."""
        if state_dir is not None:
            state_dir.mkdir(parents=True, exist_ok=True)
        path = ":memory:" if state_dir is None else str(state_dir / "weightsync.sqlite")
        self._db = sqlite3.connect(path, isolation_level=None)
        # A write-ahead log survives a killed process. A power failure also loses shared memory, so more is not needed.
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        row = self._db.execute("SELECT name FROM instance").fetchone()
        self.instance: str = row[0] if row else uuid.uuid4().hex[:12]
        if row is None:
            self._db.execute("INSERT INTO instance VALUES (?)", (self.instance,))
        self._written: dict[str, str] = {}

    def save_stream(self, key: str, state: dict[str, Any]) -> None:
        """Write a stream's state if it has changed."""
        text = json.dumps(state)
        if self._written.get(key) != text:
            self._db.execute("INSERT OR REPLACE INTO stream VALUES (?, ?)", (key, text))
            self._written[key] = text

    def save_holding(self, key: str, publication_id: int, record: HoldingRecord) -> None:
        """Store where a publication's bytes are, and its manifest."""
        row = (key, publication_id, *dataclasses.astuple(record))
        self._db.execute("INSERT OR REPLACE INTO holding VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def delete_holding(self, key: str, publication_id: int) -> None:
        """Delete a freed publication."""
        self._db.execute("DELETE FROM holding WHERE key = ? AND publication_id = ?", (key, publication_id))

    def delete_stream(self, key: str) -> None:
        """Delete a stream of a job that is over."""
        self._db.execute("DELETE FROM holding WHERE key = ?", (key,))
        self._db.execute("DELETE FROM stream WHERE key = ?", (key,))
        self._written.pop(key, None)

    def streams(self) -> dict[str, dict[str, Any]]:
        """Every stream's last state, by key."""
        return {key: json.loads(state) for key, state in self._db.execute("SELECT key, state FROM stream")}

    def holdings(self, key: str) -> list[tuple[int, HoldingRecord]]:
        """A stream's publications by id, oldest first."""
        columns = "publication_id, path, nbytes, fixed, version, handles, manifest"
        rows = self._db.execute(f"SELECT {columns} FROM holding WHERE key = ? ORDER BY publication_id", (key,))
        return [
            (publication_id, HoldingRecord(path, nbytes, bool(fixed), version, handles, manifest))
            for publication_id, path, nbytes, fixed, version, handles, manifest in rows
        ]

    def close(self) -> None:
        """Close the file."""
        self._db.close()
