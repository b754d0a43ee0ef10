"""Batches new tokens and ends of responses for the event loop."""

from __future__ import annotations

import dataclasses

from miles.services.rollout.engines.base import GenerationDelta, GenerationResult

Delivery = tuple[str, GenerationDelta | BaseException]
INTERVAL_S = 0.02
"""How long new tokens may wait here; each delivery wakes one task per request, which takes the interpreter's lock."""


@dataclasses.dataclass(slots=True)
class _Entry:
    token_ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    top_ids: list[list[int]] = dataclasses.field(default_factory=list)
    result: GenerationResult | None = None
    error: BaseException | None = None


class Outbox:
    """Collects tokens and ends per request until they are due."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._last_s = 0.0
        self._urgent = False

    def token(self, request_id: str, token: int, log_prob: float, top_ids: list[int] | None = None) -> None:
        """Add a token of a request, with the likeliest tokens where the request asks for them."""
        entry = self._entries.setdefault(request_id, _Entry())
        entry.token_ids.append(token)
        entry.log_probs.append(log_prob)
        if top_ids:
            entry.top_ids.append(top_ids)

    def end(self, request_id: str, result: GenerationResult) -> None:
        """Add the end of a request."""
        self._entries.setdefault(request_id, _Entry()).result = result
        self._urgent = True

    def fail(self, request_id: str, error: BaseException) -> None:
        """Fail a request; its tokens that were not delivered yet are discarded."""
        self._entries.setdefault(request_id, _Entry()).error = error
        self._urgent = True

    def due(self, now_s: float) -> bool:
        """Whether to deliver at this time (of any clock that does not go back)."""
        return bool(self._entries) and (self._urgent or now_s - self._last_s >= INTERVAL_S)

    def take(self, now_s: float) -> list[Delivery]:
        """Return everything collected, one delivery per request."""
        entries, self._entries = self._entries, {}
        self._last_s, self._urgent = now_s, False
        return [
            (
                request_id,
                entry.error or GenerationDelta(entry.token_ids, entry.log_probs, entry.result, tuple(entry.top_ids)),
            )
            for request_id, entry in entries.items()
        ]
