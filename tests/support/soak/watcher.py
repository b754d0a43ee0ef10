"""Follows a job's events over REST as a page does: reconnects from the last event after every interruption."""

from __future__ import annotations

import threading

import httpx

_AGAIN_S = 1.0
_SILENCE_S = 60.0
"""How long a stream may be silent; the gateway sends a comment every 15 s."""


class Watcher:
    """One job's watcher, in a thread while the job is open."""

    def __init__(self, url: str, job_id: str) -> None:
        self.ids: list[str] = []
        """Ids of the events that came, in order."""
        self._url = f"{url}/v1/jobs/{job_id}/events"
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self) -> None:
        """Go on from the last event that came, unless it is being followed."""
        if self.finished:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether nothing more will come, until `follow` is called again."""
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """Stop at the next event or interruption."""
        self._closing.set()

    def _run(self) -> None:
        with httpx.Client(timeout=_SILENCE_S) as client:
            while not self._closing.is_set():
                try:
                    if self._read(client):
                        return
                except httpx.HTTPError:
                    pass  # interrupted: what follows is read from where it was
                self._closing.wait(_AGAIN_S)

    def _read(self, client: httpx.Client) -> bool:
        """Read one stream; return whether it said that the job has ended."""
        headers = {"Last-Event-ID": self.ids[-1]} if self.ids else {}
        with client.stream("GET", self._url, headers=headers) as answer:
            if answer.is_error:
                return False
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    self.ids.append(line.removeprefix("id: "))
                elif line == "event: end":
                    return True
        return False
