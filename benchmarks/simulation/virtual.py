"""The controller's state machines in virtual time: admission and load balance are real, the rest are timers."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable

from benchmarks.simulation.lengths import Lengths
from miles.services.controller.run.admission import Admission, Batch
from miles.services.controller.workers.load_balance import LoadBalance


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What is simulated. Times in seconds."""

    rollouts: int
    slots: int
    """Groups that a rollout generates at once, each as fast as if it were alone."""
    batch_size: int
    max_staleness: int
    train_s: float
    """Of one step."""
    export_s: float
    """From the end of a step until the trainer may go on."""
    swap_s: float
    """From then until every rollout has the new weights."""
    steps: int
    lengths: Lengths
    window: int = 0
    """As over_sampling_batch_size."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a simulation, without the first steps, in which the pipeline fills."""

    groups_per_s: float
    busy: float
    """Share of all slots that were generating."""
    trainer_busy: float
    mean_staleness: float
    max_staleness: int
    step_s: float


class Simulation:
    """Runs one cluster from its first group to its last step."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._balance = LoadBalance()
        self._admission = Admission(
            batch_size=cluster.batch_size,
            max_staleness=cluster.max_staleness,
            total_groups=cluster.batch_size * cluster.steps,
            window=cluster.window,
        )
        self._training = False
        self._ends_s: list[float] = []
        self._staleness: list[tuple[int, ...]] = []
        self._generated_s: list[float] = []
        """Slot time that groups finished by the end of each step have taken."""
        self._spent_s = 0.0

    def run(self) -> Outcome:
        """Simulate everything."""
        cluster = self._cluster
        for i in range(cluster.rollouts):
            self._balance.set_capacity(f"rollout-{i}", cluster.slots)
        self._pump()
        while self._events:
            self._now_s, _, happen = heapq.heappop(self._events)
            happen()
        assert len(self._ends_s) == cluster.steps, "the job did not end"
        first = cluster.steps // 4
        elapsed = self._ends_s[-1] - self._ends_s[first]
        steps = cluster.steps - 1 - first
        staleness = [each for batch in self._staleness[first + 1 :] for each in batch]
        slot_s = (self._generated_s[-1] - self._generated_s[first]) / elapsed
        return Outcome(
            groups_per_s=steps * cluster.batch_size / elapsed,
            busy=slot_s / (cluster.rollouts * cluster.slots),
            trainer_busy=steps * cluster.train_s / elapsed,
            mean_staleness=sum(staleness) / len(staleness),
            max_staleness=max(staleness),
            step_s=elapsed / steps,
        )

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now_s + seconds, next(self._serial), happen))

    def _pump(self) -> None:
        while (worker_id := self._balance.next()) is not None:
            given = self._admission.lease(worker_id)
            if given is None:
                return
            self._balance.add_group(worker_id)
            self._generate(worker_id, *given, version=self._admission.version)

    def _generate(self, worker_id: str, group_id: int, attempt: int, version: int) -> None:
        seconds = self._cluster.lengths.group_s(group_id)

        def finish() -> None:
            self._spent_s += seconds
            self._admission.accept(group_id, attempt, version)
            self._balance.remove_group(worker_id)
            self._pump()
            self._train()

        self._after(seconds, finish)

    def _train(self) -> None:
        if self._training or (batch := self._admission.begin_step()) is None:
            return
        self._training = True
        self._after(self._cluster.train_s, lambda: self._trained(batch))

    def _trained(self, batch: Batch) -> None:
        self._admission.finish_step(batch)
        self._ends_s.append(self._now_s)
        self._staleness.append(batch.staleness)
        self._generated_s.append(self._spent_s)
        version = len(self._ends_s)
        self._after(self._cluster.export_s, self._exported)
        self._after(self._cluster.export_s + self._cluster.swap_s, lambda: self._active(version))

    def _exported(self) -> None:
        self._training = False
        self._train()

    def _active(self, version: int) -> None:
        self._admission.activate(version)
        self._pump()
        self._train()
