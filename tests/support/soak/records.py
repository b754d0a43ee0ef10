"""The folder that a soak leaves: seed, actions and violations with their times, answers, figures, logs."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import threading
import time
from typing import Any


class Records:
    """Writes the folder; usable from several threads.

    actions.jsonl    what was done and seen, one line each, with seconds since the start
    violations.jsonl what did not hold
    rest.jsonl       answers of the REST API that were not 2xx
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.violations: list[str] = []
        self._began_s = time.monotonic()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def now_s(self) -> float:
        """Seconds since the start of the soak."""
        return time.monotonic() - self._began_s

    def note(self, kind: str, **facts: Any) -> None:
        """Write a line to actions.jsonl."""
        self._write("actions.jsonl", {"kind": kind, **facts})

    def refused(self, **facts: Any) -> None:
        """Write a line to rest.jsonl."""
        self._write("rest.jsonl", facts)

    def violation(self, invariant: str, what: str) -> None:
        """Note that an invariant did not hold; the soak goes on, and fails at its end."""
        text = f"{invariant}: {what}"
        if text not in self.violations:
            self.violations.append(text)
            self._write("violations.jsonl", {"invariant": invariant, "what": what})

    def _write(self, name: str, facts: dict[str, Any]) -> None:
        line = json.dumps({"at_s": round(self.now_s, 2), "clock": time.strftime("%H:%M:%S"), **facts}, default=_plain)
        with self._lock, (self.folder / name).open("a") as file:
            file.write(line + "\n")


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
