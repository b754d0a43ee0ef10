"""One thing that a job waits for, and when people are told of it. Pure: the caller brings the time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from miles.rpc.gen import job_pb2

UNUSUAL_S = 5.0
"""A wait that is no part of a run's work is told when it is this old."""
USUAL_S = 300.0
"""The same for one that belongs to the work, e.g. for the groups of a step."""
_GROWTH = 3.0
"""A wait is told again when it is so many times as old as when it was told last."""
_LONGEST_SILENCE_S = 1800.0


@dataclasses.dataclass(frozen=True, slots=True)
class Wait:
    """One thing that is waited for. Times are seconds since the Unix epoch."""

    what: str
    """What is waited for, in words; tells waits apart."""
    detail: str = ""
    """What is known of it; may change while it is waited for."""
    since_s: float | None = None
    """Since when; None: since it was noted first."""
    limit_s: float | None = None
    """How long it is waited for, in seconds; None: without a bound."""
    ending: str = ""
    """What happens then or, without a bound, how to end the wait."""
    samples: int = 0
    """Samples that wait, a count; 0 where they are not counted."""
    patience_s: float = UNUSUAL_S
    """How old it must be before people are told."""

    @property
    def gives_up_s(self) -> float | None:
        """When waiting ends by itself; None when it has no bound or no beginning yet."""
        return None if self.limit_s is None or self.since_s is None else self.since_s + self.limit_s

    def to_proto(self) -> job_pb2.Wait:
        """Return the wait as a message."""
        return job_pb2.Wait(
            what=self.what,
            detail=self.detail,
            since_unix_ns=int((self.since_s or 0.0) * 1e9),
            gives_up_unix_ns=int((self.gives_up_s or 0.0) * 1e9),
            ending=self.ending,
            samples=self.samples,
        )


def wait_from_proto(message: job_pb2.Wait) -> Wait:
    """Return a wait that another service reported."""
    since_s, gives_up_s = message.since_unix_ns / 1e9, message.gives_up_unix_ns / 1e9
    limit_s = gives_up_s - since_s if gives_up_s else None
    return Wait(message.what, message.detail, since_s, limit_s, message.ending, message.samples)


def merged(waits: Iterable[Wait]) -> list[Wait]:
    """Join what several workers wait for: the oldest beginning, the first detail that is known, samples added up."""
    by_what: dict[str, Wait] = {}
    for wait in waits:
        known = by_what.get(wait.what)
        if known is None:
            by_what[wait.what] = wait
            continue
        older = min((known, wait), key=lambda each: each.since_s or 0.0)
        by_what[wait.what] = dataclasses.replace(
            older, detail=known.detail or wait.detail, samples=known.samples + wait.samples
        )
    return list(by_what.values())


def duration(seconds: float) -> str:
    """Format a length of time for people."""
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def sentence(wait: Wait, now_s: float) -> str:
    """Say what is waited for, since when, and how it ends."""
    since_s = now_s if wait.since_s is None else wait.since_s
    counted = f" ({wait.samples} sample{'s' * (wait.samples != 1)} waiting)" if wait.samples else ""
    detail = f": {wait.detail}" if wait.detail else ""
    end = f"; {wait.ending}" if wait.ending else ""
    if wait.gives_up_s is not None:
        end = f"; gives up in {duration(wait.gives_up_s - now_s)}" + (f": {wait.ending}" if wait.ending else "")
    return f"{wait.what} for {duration(now_s - since_s)}{counted}{detail}{end}"


@dataclasses.dataclass(slots=True)
class _Noted:
    wait: Wait
    since_s: float
    due_s: float
    """When people are to be told of it."""
    told: bool = False


class WaitLog:
    """Gets everything that is waited for, again and again, and returns what people are to be told of it."""

    def __init__(self) -> None:
        self._noted: dict[str, _Noted] = {}
        self._over: list[_Noted] = []
        """Waits that people were told of and that are over."""

    @property
    def waits(self) -> Sequence[Wait]:
        """What was noted last, each with its beginning."""
        return [noted.wait for noted in self._noted.values()]

    def note(self, waits: Iterable[Wait], now_s: float) -> None:
        """Note everything that is waited for now, in order; what is not among it is not waited for any more.

        `news` says once more that a wait that people were told of is over.
        """
        before, self._noted = self._noted, {}
        for wait in waits:
            known = before.pop(wait.what, None)
            first_s = now_s if known is None else known.since_s
            since_s = first_s if wait.since_s is None else wait.since_s
            noted = known or _Noted(wait, since_s, since_s + wait.patience_s)
            noted.wait, noted.since_s = dataclasses.replace(wait, since_s=since_s), since_s
            self._noted[wait.what] = noted
        self._over += [noted for noted in before.values() if noted.told]

    def news(self, now_s: float) -> Iterator[str]:
        """Yield what to tell now: of new waits, of old ones at growing intervals, and of those that are over."""
        for over in self._over:
            yield f"no longer waiting for {over.wait.what} (it took {duration(now_s - over.since_s)})"
        self._over = []
        for noted in self._noted.values():
            if now_s < noted.due_s:
                continue
            noted.told = True
            age_s = max(noted.wait.patience_s, now_s - noted.since_s)
            noted.due_s = now_s + min(age_s * (_GROWTH - 1), _LONGEST_SILENCE_S)
            yield f"waiting for {sentence(noted.wait, now_s)}"
