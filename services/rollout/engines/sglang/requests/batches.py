"""Batches requests that arrive together into one POST: accepting a request costs as much as hundreds of its tokens.

The samples of a group are requested at the same moment. In one POST they cost the server's front process half as much
as one by one, and this process even less; each still has its own id, end and events.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

MOST = 64
"""Requests in one POST."""
_EACH = ("rid", "input_ids", "sampling_params", "extra_key")
"""Fields of which SGLang takes a list; all others apply to a whole batch."""
_SHARED = ("sampling_params", "extra_key")
"""Of those, fields that it also takes once for all."""

Events = AsyncGenerator[dict[str, Any], None]


class Batches:
    """Collects requests until the event loop has run all ready tasks, then sends those of a kind at once.

    Requests of different groups never share a POST: one that the server rejects ends its whole batch.
    """

    def __init__(self, send: Callable[[Mapping[str, Any], Callable[[], None]], Events]) -> None:
        """`send` posts a body, calls back once the server has it, and yields the events of its stream."""
        self._send = send
        self._waiting: dict[tuple[Any, ...], list[_Part]] = {}
        self._unaccepted: dict[str, _Part] = {}
        """By id: requests that the server does not have yet."""
        self._sending: set[asyncio.Task[None]] = set()

    async def generate(self, group: str, payload: Mapping[str, Any]) -> Events:
        """The events of one request; raises what `send` raises. Leaving it early does not end the request."""
        part = self._unaccepted[payload["rid"]] = _Part(payload)
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        shared = tuple((name, value) for name, value in payload.items() if name not in _EACH)
        self._waiting.setdefault((group or id(part), shared), []).append(part)
        while (event := await part.events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event

    async def until_accepted(self, rid: str) -> None:
        """Return once the server has this request, or will never have it; before that an abort of it is lost."""
        if (part := self._unaccepted.get(rid)) is not None:
            await part.accepted.wait()

    def close(self) -> None:
        """Cancel the batches that are being sent."""
        for task in self._sending:
            task.cancel()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for collected in waiting.values():
            for start in range(0, len(collected), MOST):
                parts = collected[start : start + MOST]
                task = asyncio.create_task(self._send_batch(parts))
                self._sending.add(task)
                task.add_done_callback(functools.partial(self._end, parts))

    async def _send_batch(self, parts: Sequence[_Part]) -> None:
        """Send a batch and pass on its events, to the end of the stream, so that its connection can be reused."""
        async for event in self._send(merged([part.payload for part in parts]), lambda: self._accept(parts)):
            parts[event.get("index", 0)].events.put_nowait(event)

    def _accept(self, parts: Sequence[_Part]) -> None:
        for part in parts:
            self._unaccepted.pop(part.payload["rid"], None)
            part.accepted.set()

    def _end(self, parts: Sequence[_Part], task: asyncio.Task[None]) -> None:
        """End every request of a batch, with its error if there was one; also when it was cancelled before sending."""
        self._sending.discard(task)
        self._accept(parts)
        end = None if task.cancelled() else task.exception()
        for part in parts:
            part.events.put_nowait(end)


class _Part:
    """One request of a batch."""

    def __init__(self, payload: Mapping[str, Any]) -> None:
        self.payload = payload
        self.events: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue()
        """Its events, then None or the error that ended it."""
        self.accepted = asyncio.Event()


def merged(payloads: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """One body for requests that differ only in the fields of which SGLang takes a list."""
    first = payloads[0]
    if len(payloads) == 1:
        return first
    lists = {name: [payload[name] for payload in payloads] for name in _EACH}
    # SGLang takes one value of these for all, which is written and read once.
    shared = {name: first[name] for name in _SHARED if all(value == first[name] for value in lists[name])}
    return {**first, **lists, **shared}
