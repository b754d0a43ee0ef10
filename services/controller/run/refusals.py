"""Decides when no rollout is left whose engine could take the trainer's weights: pure rules, without I/O or a clock."""

from __future__ import annotations

from collections.abc import Mapping

from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import WeightsRefusedError


class Refusals:
    """All engines of a job have the same model, but one worker of several may be set up wrongly.

    So one that refuses the weights is left out as long as there is another one: one that serves or is still loading,
    or one that was lost and may come back.
    """

    def __init__(self) -> None:
        self._lost_s: dict[str, float] = {}
        """When workers that had not refused the weights were lost, by name."""

    def lost(self, worker_id: str, now_s: float) -> None:
        """Note the loss of a worker that has not refused the weights."""
        self._lost_s[worker_id] = now_s

    def check(self, refusals: Mapping[str, str], now_s: float) -> None:
        """Raise WeightsRefusedError when every worker refuses; `refusals` holds their words, empty for those that do
        not."""
        gone = [lost_s for worker_id, lost_s in self._lost_s.items() if worker_id not in refusals]
        if any(now_s - lost_s < deadlines.WORKERS_ATTACH_S for lost_s in gone):
            return
        if refusals and all(refusals.values()):
            raise WeightsRefusedError("; ".join(f"{name}: {words}" for name, words in refusals.items()))
