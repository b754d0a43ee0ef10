"""Health probes of a server, from a thread of their own, so that a busy event loop does not make it look dead."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import Any

_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """The load that a server reports."""

    cache_use: float
    """Fraction of the key-value cache that is in use."""
    running: int
    waiting: int
    max_running: int
    at: float = 0.0
    """When a scheduler last reported, in seconds of its host's clock: does not advance while all of them hang."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProbeTimes:
    """When a server is probed, in seconds."""

    interval_s: float = 1.0
    silence_timeout_s: float = 30.0
    """A server that has answered no probe for this long is lost; one that does not answer is given no more."""
    first_wait_s: float = 0.0
    """Before the first probe, beside the interval."""


class Probe:
    """Probes one server again and again, and reports its load, or too long a silence, to the event loop."""

    def __init__(
        self,
        address: str,
        times: ProbeTimes,
        on_load: Callable[[Load], None],
        on_silence: Callable[[str], None],
    ) -> None:
        """Both callbacks are called on the event loop that calls `start`."""
        self._address = address
        self._times = times
        self._on_load = on_load
        self._on_silence = on_silence
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start probing."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(
            target=self._run, args=(loop,), name=f"probe of SGLang at {self._address}", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop probing."""
        self._stop.set()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        times, problem = self._times, ""
        self._stop.wait(times.first_wait_s)
        answered = time.monotonic()
        while not self._stop.wait(times.interval_s):
            try:
                load = probe(self._address, min(_TIMEOUT_S, times.silence_timeout_s))
                answered = time.monotonic()
                self._report(loop, functools.partial(self._on_load, load))
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if (silent_s := time.monotonic() - answered) > times.silence_timeout_s:
                message = f"no answer from SGLang at {self._address} for {silent_s:.0f} s ({problem})"
                self._report(loop, functools.partial(self._on_silence, message))
                return

    def _report(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        def unless_stopped() -> None:
            if not self._stop.is_set():
                call()

        if not loop.is_closed():
            loop.call_soon_threadsafe(unless_stopped)


def probe(address: str, timeout_s: float = _TIMEOUT_S) -> Load:
    """Ask a server for its load; it answers without its scheduler. Raises OSError, HTTPException or ValueError."""
    host, _, port = address.rpartition(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=timeout_s)) as connection:
        connection.request("GET", "/v1/loads?include=core")
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise ValueError(f"/v1/loads answered {response.status}")
    ranks: list[dict[str, Any]] = json.loads(content)["loads"]
    return Load(
        cache_use=max((float(rank.get("token_usage", 0.0)) for rank in ranks), default=0.0),
        running=sum(int(rank.get("num_running_reqs", 0)) for rank in ranks),
        waiting=sum(int(rank.get("num_waiting_reqs", 0)) for rank in ranks),
        max_running=sum(int(rank.get("max_running_requests", 0)) for rank in ranks),
        at=max((float(rank.get("timestamp", 0.0)) for rank in ranks), default=0.0),
    )
