"""One activation: which engines it waits for, and how far they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from miles.services.weightsync.state import Engine, Outcome


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
    """Engines that must bring the version in, or be quarantined, before it can end."""
    swapping: bool = False
    """False while engines prefetch; nobody swaps before enough of them have verified the bytes."""
    quarantined: set[str] = dataclasses.field(default_factory=set)
    swapped: set[str] = dataclasses.field(default_factory=set)

    @property
    def operation_id(self) -> str:
        """The operation that started it."""
        return self.operation_ids[0]

    @property
    def prefetch_deadline_s(self) -> float:
        """Half of the time, so that those that have the bytes still get to swap when another engine is stuck."""
        return (self.began_s + self.deadline_s) / 2

    def complete(self, engine: Engine) -> bool:
        """Whether the engine is where the activation wants it."""
        checked = not self.check_equal or engine.checked_by == self.operation_id
        return engine.serves(self.publication_id) and checked

    def serving(self, engines: Mapping[str, Engine]) -> int:
        """Engines that are where the activation wants them, waited for or not, a count."""
        return sum(self.complete(engine) for engine in engines.values())

    def ready(self, engines: Mapping[str, Engine]) -> int:
        """Engines that have verified the bytes, a count."""
        return sum(engine.has(self.publication_id) for engine in engines.values())

    def without_bytes(self, engines: Mapping[str, Engine]) -> list[Engine]:
        """Engines waited for that have not verified the bytes yet."""
        return [engines[name] for name in sorted(self.waited_for) if not engines[name].has(self.publication_id)]

    def pending(self, engines: Mapping[str, Engine]) -> list[Engine]:
        """Engines waited for that are not there yet."""
        return [engines[name] for name in sorted(self.waited_for) if not self.complete(engines[name])]

    def outcome(self, engines: Mapping[str, Engine], now_s: float, error: str) -> Outcome:
        """How it ended; with an error, also why each quarantined engine is."""
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
        )
