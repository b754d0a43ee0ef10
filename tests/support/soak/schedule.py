"""What a soak does next: a pure state machine. The same seed and the same views give the same actions."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

OPEN_JOBS = 3
"""Jobs that are queued or run at a time."""
KILLS, WINDOW_S = 3, 330.0
"""Kills of one service within a window: one that ends more often than 5 times in 300 s is not restarted any more."""
GOOD_SHARE = 0.7
"""Share of submitted jobs that are to succeed."""
_MEAN_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 20.0
_FREEZE_S = (2.0, 12.0)
_LONG_FREEZE_S = (24.0, 32.0)
"""Longer than a worker's lease."""
_LONG_FREEZES = 0.25
_REMEMBERED = 6
"""Of the jobs that have ended, so many newest are still acted on and looked at."""
_ENDED = frozenset({"succeeded", "failed", "cancelled", "stopped"})


@dataclasses.dataclass(frozen=True, slots=True)
class JobView:
    """A job as far as the schedule is concerned."""

    number: int
    good: bool
    state: str


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """The soak at one moment."""

    now_s: float
    jobs: Sequence[JobView] = ()
    calm: bool = True
    """Every service is there and answers."""
    moved: bool = True
    """A job has taken a step or ended since the last strike, or that was long ago."""


@dataclasses.dataclass(frozen=True, slots=True)
class Submit:
    """Submit a job of a recipe."""

    recipe: str


@dataclasses.dataclass(frozen=True, slots=True)
class Act:
    """Send a job's action: pause, resume, stop, cancel or checkpoint."""

    number: int
    action: str


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """Read everything that REST gives of a job."""

    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class ShareFolder:
    """Submit another job into the run folder of this one, which must be refused."""

    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class Kill:
    """Kill services with SIGKILL, all at the same moment."""

    services: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Freeze:
    """Stop a service with SIGSTOP, and continue it after some seconds."""

    service: str
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Restart:
    """End all services, with SIGTERM or by killing the launcher, and start them again in the same folder."""

    kill: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Nothing:
    """Nothing is possible or wanted now."""


Action = Submit | Act | Look | ShareFolder | Kill | Freeze | Restart | Nothing
STRIKES = (Kill, Freeze, Restart)


class SoakSchedule:
    """Chooses one action after the other."""

    def __init__(self, seed: int, services: Sequence[str], good: Sequence[str], bad: Sequence[str]) -> None:
        """`services` may be killed and frozen; `good` and `bad` are recipes of jobs."""
        self._random = random.Random(seed)
        self._services = tuple(sorted(services))
        self._good, self._bad = tuple(sorted(good)), tuple(sorted(bad))
        self._untried: list[str] = []
        self._kills_s: dict[str, deque[float]] = defaultdict(deque)

    def pause_s(self) -> float:
        """Seconds until the next action."""
        return min(_LONGEST_PAUSE_S, self._random.expovariate(1 / _MEAN_PAUSE_S))

    def choose(self, view: View) -> Action:
        """Return what to do now."""
        options = self._options(view)
        weights = [weight for weight, _ in options]
        return self._random.choices(options, weights)[0][1]() if options else Nothing()

    def wind_down(self, view: View) -> Action:
        """Return what makes the open jobs end: nothing new, and paused jobs are resumed or cancelled."""
        paused = [job for job in view.jobs if job.state == "paused"]
        if not paused or not view.calm:
            return Nothing()
        return Act(paused[0].number, self._random.choice(("resume", "cancel")))

    def _options(self, view: View) -> list[tuple[float, Callable[[], Action]]]:
        found: list[tuple[float, Callable[[], Action]]] = []
        open_jobs = [job for job in view.jobs if job.state not in _ENDED]
        if len(open_jobs) < OPEN_JOBS:
            found.append((6.0 if not open_jobs else 3.0, lambda: Submit(self._recipe())))
        found += [(1.0, lambda: self._act(view)), (0.7, lambda: self._look(view))] if view.jobs else []
        if open_jobs:
            found.append((0.3, lambda: ShareFolder(self._random.choice(open_jobs).number)))
        if view.calm and view.moved:
            killable = self._killable(view.now_s)
            found += [(1.5, lambda: self._kill(view.now_s, killable))] if killable else []
            found.append((0.8, self._freeze))
            if len(killable) == len(self._services):
                found.append((0.1, lambda: self._restart(view.now_s)))
        return found

    def _recipe(self) -> str:
        """Every recipe once before any comes again."""
        if not self._untried:
            self._untried = self._shuffled()
        return self._untried.pop()

    def _shuffled(self) -> list[str]:
        bad = self._random.sample(self._bad, len(self._bad))
        goods = max(len(self._good), round(len(bad) * GOOD_SHARE / (1 - GOOD_SHARE)))
        mixed = [self._good[i % len(self._good)] for i in range(goods)] + bad
        self._random.shuffle(mixed)
        return mixed

    def _act(self, view: View) -> Action:
        near = [job for i, job in enumerate(view.jobs) if job.state not in _ENDED or i >= len(view.jobs) - _REMEMBERED]
        choices = [(job, action, weight) for job in near for action, weight in _ACTIONS.get(job.state, {}).items()]
        if not choices:
            return Nothing()
        job, action, _ = self._random.choices(choices, [weight for _, _, weight in choices])[0]
        return Act(job.number, action)

    def _look(self, view: View) -> Action:
        return Look(self._random.choice(view.jobs[-_REMEMBERED:]).number)

    def _killable(self, now_s: float) -> list[str]:
        for times in self._kills_s.values():
            while times and times[0] < now_s - WINDOW_S:
                times.popleft()
        return [name for name in self._services if len(self._kills_s[name]) < KILLS]

    def _kill(self, now_s: float, killable: Sequence[str]) -> Action:
        count = self._random.choice((1, 1, 1, 1, 2, len(killable)))
        victims = tuple(sorted(self._random.sample(killable, min(count, len(killable)))))
        for name in victims:
            self._kills_s[name].append(now_s)
        return Kill(victims)

    def _freeze(self) -> Action:
        bounds = _LONG_FREEZE_S if self._random.random() < _LONG_FREEZES else _FREEZE_S
        return Freeze(self._random.choice(self._services), round(self._random.uniform(*bounds), 1))

    def _restart(self, now_s: float) -> Action:
        self._kills_s.clear()  # the new launcher counts from zero
        return Restart(kill=self._random.random() < 0.5)


_ACTIONS: dict[str, dict[str, float]] = {
    "queued": {"cancel": 0.1, "stop": 0.1},
    "starting": {"pause": 0.4, "stop": 0.2, "cancel": 0.1},
    "running": {"pause": 3.0, "checkpoint": 2.5, "stop": 1.0, "cancel": 0.2},
    "recovering": {"pause": 0.5, "stop": 0.3, "cancel": 0.1, "checkpoint": 0.3},
    "paused": {"resume": 8.0, "checkpoint": 1.0, "stop": 1.0, "cancel": 0.5},
    "stopped": {"resume": 1.5},
    "failed": {"resume": 0.2},
    "cancelled": {"cancel": 0.05, "resume": 0.05},
    "succeeded": {"cancel": 0.05},
}
"""How likely an action is in each state of a job; some are refused, which is as it should be."""
