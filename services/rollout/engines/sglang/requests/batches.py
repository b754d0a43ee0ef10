"""Requests that come together go to a server together: taking one in costs as much as hundreds of its tokens.

The samples of a group are asked for at the same moment. In one POST they cost the server's front process half as much
as one by one, and this process less than that; each still has its own id, its own end and its own events.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

MOST = 64
"""Requests in one POST."""
_EACH = ("rid", "input_ids", "sampling_params", "extra_key")
"""What SGLang takes a list of; everything else counts for a whole batch."""

Events = AsyncGenerator[dict[str, Any], None]


class Batches:
    """Collects requests until the event loop has heard everybody who is ready, then sends those of a kind at once.

    Requests of other groups never share a POST: one that the server finds at fault ends its whole batch.
    """

    def __init__(self, send: Callable[[Mapping[str, Any]], Events], abort: Callable[[str], None]) -> None:
        """`send` posts a body and yields the events of its stream; `abort` has the server end a request by its id."""
        self._send = send
        self._abort = abort
        self._waiting: dict[tuple[Any, ...], list[_Part]] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    async def generate(self, group: str, payload: Mapping[str, Any]) -> Events:
        """The events of one request; raises what `send` does. Leaving it early ends the request."""
        part = _Part(payload)
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        shared = tuple((name, value) for name, value in payload.items() if name not in _EACH)
        self._waiting.setdefault((group or id(part), shared), []).append(part)
        try:
            while (word := await part.words.get()) is not None:
                if isinstance(word, BaseException):
                    raise word
                yield word
        finally:
            part.left = True

    def close(self) -> None:
        """Send nothing more."""
        for task in self._under_way:
            task.cancel()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for collected in waiting.values():
            wanted = [part for part in collected if not part.left]
            for start in range(0, len(wanted), MOST):
                parts = wanted[start : start + MOST]
                task = asyncio.create_task(self._carry(parts))
                self._under_way.add(task)
                task.add_done_callback(functools.partial(self._end, parts))

    async def _carry(self, parts: Sequence[_Part]) -> None:
        """Send a batch and hand each its events, to the end of the stream, so that its connection can be used again."""
        async for event in self._send(merged([part.payload for part in parts])):
            part = parts[event.get("index", 0)]
            part.words.put_nowait(event)
            if part.left and event["meta_info"]["finish_reason"] is None:
                self._abort(part.payload["rid"])  # an order that came before the server knew of it was lost

    def _end(self, parts: Sequence[_Part], task: asyncio.Task[None]) -> None:
        """Tell each of a batch that it is over, and what broke it; also when it was given up before it began."""
        self._under_way.discard(task)
        end = None if task.cancelled() else task.exception()
        for part in parts:
            part.words.put_nowait(end)


class _Part:
    """One request of a batch."""

    def __init__(self, payload: Mapping[str, Any]) -> None:
        self.payload = payload
        self.words: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue()
        """Its events, then None or what broke it."""
        self.left = False
        """Whether nobody listens any more."""


def merged(payloads: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """One body for requests that differ in what SGLang takes a list of."""
    if len(payloads) == 1:
        return payloads[0]
    return {**payloads[0], **{name: [payload[name] for payload in payloads] for name in _EACH}}
