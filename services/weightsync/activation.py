"""One activation: the engines it waits for and their progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from miles.services.weightsync.actions import Outcome
from miles.services.weightsync.engine import Engine

_OUTCOMES_KEPT = 256


@dataclasses.dataclass(slots=True)
class Activation:
    """The activation under way. Times are in seconds on the caller's monotonic clock."""

    publication_id: int
    operation_ids: list[str]
    """The operation that started it, then those that joined."""
    began_s: float
    deadline_s: float
    min_engines: int
    check_equal: bool
    waited_for: set[str]
    """Engines that must serve the version, or be quarantined, before it can end."""
    swapping: bool = False
    """False while engines prefetch; no engine swaps before enough of them have verified the bytes."""
    quarantined: set[str] = dataclasses.field(default_factory=set)
    swapped: set[str] = dataclasses.field(default_factory=set)

    @property
    def operation_id(self) -> str:
        """The operation that started it."""
        return self.operation_ids[0]

    @property
    def prefetch_deadline_s(self) -> float:
        """Half of the time, so that engines that have the bytes still swap in time when another engine is stuck."""
        return (self.began_s + self.deadline_s) / 2

    def join(self, operation_id: str, wait_for: Collection[str]) -> None:
        """Add an operation for the same version; it may only reduce the engines waited for."""
        if operation_id not in self.operation_ids:
            self.operation_ids.append(operation_id)
        if wait_for:
            self.waited_for.intersection_update(wait_for)

    def complete(self, engine: Engine) -> bool:
        """Whether the engine serves the version, and has passed the check if there is one."""
        checked = not self.check_equal or engine.checked_by == self.operation_id
        return engine.serves(self.publication_id) and checked

    def required(self, engines: Mapping[str, Engine]) -> int:
        """Number of engines that have to serve the version.

        All engines of a job have the same model, but one worker of several may be set up wrongly: engines that refuse
        the version are left out, as long as there is another one. So are those that cannot get its bytes.
        """
        number = self.publication_id
        unable = {e.engine_id for e in engines.values() if e.refused == number or _is_beyond(e, number)}
        if not unable:
            return self.min_engines
        others = [e for e in engines.values() if e.session is not None and e.engine_id not in unable]
        return min(self.min_engines, max(1, len(others)))

    def refused_by_all(self, engines: Mapping[str, Engine], late: bool) -> bool:
        """Whether engines refuse the version and no other is left; one that is away counts until it is `late`."""
        refusing = any(engine.refused == self.publication_id for engine in engines.values())
        there = [engine for engine in engines.values() if engine.session is not None or not late]
        return refusing and all(engine.refused == self.publication_id for engine in there)

    def out_of_reach_of_all(self, engines: Mapping[str, Engine]) -> bool:
        """Whether engines are attached, and none of those can get the version's bytes."""
        attached = [engine for engine in engines.values() if engine.session is not None]
        return bool(attached) and all(_is_beyond(engine, self.publication_id) for engine in attached)

    def serving(self, engines: Mapping[str, Engine]) -> int:
        """Number of complete engines, waited for or not."""
        return sum(self.complete(engine) for engine in engines.values())

    def ready(self, engines: Mapping[str, Engine]) -> int:
        """Number of engines that have verified the bytes."""
        return sum(engine.has(self.publication_id) for engine in engines.values())

    def without_bytes(self, engines: Mapping[str, Engine]) -> list[Engine]:
        """Engines waited for that have not verified the bytes yet."""
        return [engines[name] for name in sorted(self.waited_for) if not engines[name].has(self.publication_id)]

    def pending(self, engines: Mapping[str, Engine]) -> list[Engine]:
        """Engines waited for that are not complete yet."""
        return [engines[name] for name in sorted(self.waited_for) if not self.complete(engines[name])]

    def outcome(self, engines: Mapping[str, Engine], now_s: float, error: str, refused: bool) -> Outcome:
        """How it ended; an error also says why each quarantined engine was quarantined."""
        serving = [engine for engine in engines.values() if engine.serves(self.publication_id)]
        faults = [f"{engine.engine_id}: {engine.last_error}" for engine in engines.values() if engine.quarantined]
        return Outcome(
            publication_id=self.publication_id,
            ok=not error,
            engines=len(serving),
            quarantined=len(self.quarantined),
            total_s=now_s - self.began_s,
            pause_s=max((engine.pause_s for engine in serving if engine.engine_id in self.swapped), default=0.0),
            error="; ".join([error, *faults]) if error else "",
            refused=refused,
        )


def _is_beyond(engine: Engine, publication_id: int) -> bool:
    """Whether an engine that does not serve a publication cannot get its bytes either."""
    return publication_id in engine.out_of_reach and engine.held != publication_id


def able_to_load(publication_id: int, engines: Mapping[str, Engine], wait_for: Collection[str]) -> set[str]:
    """Engines that an activation waits for: those named (none: all) that are attached and can load the version."""
    return {
        engine.engine_id
        for engine in engines.values()
        if engine.session is not None
        and not engine.quarantined
        and publication_id not in engine.out_of_reach
        and (not wait_for or engine.engine_id in wait_for)
    }


def keep_outcome(known: Mapping[str, Outcome], operation_ids: Sequence[str], outcome: Outcome) -> dict[str, Outcome]:
    """Outcomes by operation id, the newest last, with that of an activation that has ended; the oldest are dropped."""
    others = {name: kept for name, kept in known.items() if name not in operation_ids}
    return dict(list({**others, **dict.fromkeys(operation_ids, outcome)}.items())[-_OUTCOMES_KEPT:])
