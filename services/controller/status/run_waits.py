"""What a run waits for, from what its parts know of themselves. Pure.

Each rule is a function of the facts; together they return everything that is waited for, the most telling first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from miles.services.controller.clients import deadlines
from miles.services.controller.run.failed_groups import MAX_DROPPED_IN_A_ROW
from miles.services.controller.status.waits import UNUSUAL_S, USUAL_S, Wait, duration, merged

SILENT_BEATS = 3
"""A worker is named once so many of its heartbeats are overdue."""
_PUBLISHING_S = 60.0
"""Loading a version is a part of the work; a load that takes longer is told."""
_ROWS = 4
"""So many of several equal things are named."""
READING = "the data to be read"
"""What a run waits for at its very beginning."""
_START_OR_STOP = "no bound: start one, or stop the job"


@dataclasses.dataclass(frozen=True, slots=True)
class LoadingWorker:
    """A worker that loads the job."""

    worker_id: str
    stage: str
    """What it said that it does; empty before it answered."""
    since_s: float
    """When it was asked to load the job, in seconds since the Unix epoch."""


@dataclasses.dataclass(frozen=True, slots=True)
class RolloutFacts:
    """One rollout worker, as far as waiting is concerned."""

    worker_id: str
    connected: bool
    """Whether it has loaded the job and works."""
    capacity: int = 0
    out_of_routing: str = ""
    waits: tuple[Wait, ...] = ()
    """What its groups wait for, as it says."""


@dataclasses.dataclass(frozen=True, slots=True)
class EvaluationFacts:
    """The evaluation that runs."""

    version: int
    finished: int
    groups: int
    failures: str = ""
    """Words of its last failed group."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunFacts:
    """What the parts of a run know. Times are seconds since the Unix epoch."""

    phase: str
    waiting_for: str
    since_s: float
    now_s: float
    silent_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """How long each attached worker has sent no heartbeat, in seconds."""
    lease_s: float = 0.0
    """With how much silence a worker lease ends."""
    heartbeat_interval_s: float = 2.0
    loading: tuple[LoadingWorker, ...] = ()
    rollouts: tuple[RolloutFacts, ...] = ()
    wanted_rollouts: int = 0
    lost: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How often the lease of each rollout that is not attached now has ended."""
    load_faults: str = ""
    """What engines say that fail to load the version."""
    version: int = 0
    """Version that the trainer exported last."""
    engines_behind: str = ""
    """Engines that do not serve it yet, with what they say."""
    failing: str = ""
    """What is said of groups while nothing but failures comes back; empty otherwise."""
    dropped: str = ""
    """What is said of groups that a filter drops; empty while some are kept."""
    dropped_limit: int = 0
    evaluation: EvaluationFacts | None = None
    trainer_said: str = ""
    """What the trainer reported last of a step."""


Rule = Callable[[RunFacts], Iterator[Wait]]


def waits_of(run: RunFacts) -> list[Wait]:
    """Return everything that a run waits for, the most telling first."""
    return merged(wait for rule in _RULES for wait in rule(run))


def workers_that_are_silent(run: RunFacts) -> Iterator[Wait]:
    """A worker that is stopped or hangs sends no heartbeats; of many, one speaks for all."""
    limit_s = SILENT_BEATS * run.heartbeat_interval_s
    silent = {f"a heartbeat of {name}": s for name, s in sorted(run.silent_s.items()) if s >= limit_s}
    detail = "its process is stopped, hangs, or its machine is overloaded"
    if len(silent) > _ROWS:
        detail = f"{len(silent)} of them send none: their machine or this one is overloaded, or the network is broken"
        silent = {"heartbeats of workers": max(silent.values())}
    for what, silent_s in silent.items():
        yield Wait(
            what,
            detail,
            since_s=run.now_s - silent_s,
            limit_s=run.lease_s,
            ending="its worker lease ends and others do its work",
            patience_s=0.0,
        )


def rollouts_that_are_not_there(run: RunFacts) -> Iterator[Wait]:
    """A run goes on with the rollouts that it has, if there are any."""
    there = len(run.rollouts)
    if run.phase in _BEFORE_ROLLOUTS or there >= run.wanted_rollouts:
        return
    lost = ", ".join(f"{name}{f' {times} times' * (times > 1)}" for name, times in sorted(run.lost.items())[:_ROWS])
    detail = f"lost: {lost}" if lost else "it has not attached"
    if there:
        missing = run.wanted_rollouts - there
        what = f"{missing} more rollout worker{'s' * (missing > 1)} ({there} of {run.wanted_rollouts} attached)"
        yield Wait(what, detail, ending="no bound: the run goes on with those that are attached")
    else:
        yield Wait(f"a rollout worker to attach (0 of {run.wanted_rollouts})", detail, ending=_START_OR_STOP)


def workers_that_load_the_job(run: RunFacts) -> Iterator[Wait]:
    """A worker that loads a model says what it does; of many, one speaks for all."""
    if not run.loading:
        return
    ending = f"it fails after {duration(deadlines.START_JOB_SILENCE_S)} without a word from it"
    first = min(run.loading, key=lambda worker: worker.since_s)
    if len(run.loading) > _ROWS:
        said = f"{len(run.loading)} of them; {first.worker_id}: {first.stage or 'it has not answered yet'}"
        yield Wait("workers to load the job", said, since_s=first.since_s, ending=ending)
        return
    for worker in run.loading:
        stage = worker.stage or "it has not answered yet"
        yield Wait(f"{worker.worker_id} to load the job", stage, since_s=worker.since_s, ending=ending)


def engines_that_serve_nothing(run: RunFacts) -> Iterator[Wait]:
    """An engine out of routing takes no groups."""
    for rollout in run.rollouts:
        if rollout.connected and not rollout.capacity and rollout.out_of_routing:
            yield Wait(
                f"{rollout.worker_id} to serve verified weights",
                rollout.out_of_routing,
                ending="no bound: it loads the next version, or is restarted",
            )


def engines_that_fail_to_load(run: RunFacts) -> Iterator[Wait]:
    """Loading a version is tried again."""
    if run.load_faults and run.phase in _LOAD_PHASES:
        yield Wait(
            "engines to load the version",
            run.load_faults,
            ending="a run that comes back nine times to one step without taking it fails",
        )


def engines_that_are_behind(run: RunFacts) -> Iterator[Wait]:
    """A version is published while the trainer goes on; who does not serve it yet is named."""
    if run.engines_behind and not run.load_faults:
        yield Wait(
            f"engines to load version {run.version}",
            run.engines_behind,
            limit_s=deadlines.ACTIVATE_S,
            ending="the run loads its newest checkpoint",
            patience_s=_PUBLISHING_S,
        )


def groups_that_do_not_fail(run: RunFacts) -> Iterator[Wait]:
    """Nothing comes of groups that all fail."""
    if run.failing:
        yield Wait(
            "a group that does not fail",
            run.failing,
            ending=f"a group is dropped after 5 attempts, and the job fails at {MAX_DROPPED_IN_A_ROW} in a row",
        )


def what_rollouts_wait_for(run: RunFacts) -> Iterator[Wait]:
    """Rewards and the queue, as the rollouts say."""
    for rollout in run.rollouts:
        for wait in rollout.waits:  # it reports them when they are worth a word
            yield dataclasses.replace(wait, patience_s=1.0)


def groups_that_a_filter_keeps(run: RunFacts) -> Iterator[Wait]:
    """Nothing comes of groups that are all dropped."""
    if run.dropped:
        limit = run.dropped_limit
        yield Wait(
            "a group that is kept",
            run.dropped,
            ending=f"the job fails at {limit} dropped groups in a row"
            if limit
            else "no bound (dynamic_sampling_max_dropped_batches is 0): stop the job",
        )


def the_evaluation(run: RunFacts) -> Iterator[Wait]:
    """An evaluation says how far it is."""
    if (evaluation := run.evaluation) is None:
        return
    failures = f"; the last failure: {evaluation.failures}" if evaluation.failures else ""
    yield Wait(
        f"the evaluation of version {evaluation.version}",
        f"{evaluation.finished} of {evaluation.groups} prompts are done{failures}",
        ending="no bound: it fails when one prompt fails 5 times; cancel the job to end it",
        patience_s=UNUSUAL_S if failures else USUAL_S,
    )


def what_the_phase_waits_for(run: RunFacts) -> Iterator[Wait]:
    """What the run loop waits for, unless its workers say it better."""
    if (not run.waiting_for and run.phase != "training") or (run.phase == "loading" and run.loading):
        return
    usual = (None, _STOP, UNUSUAL_S)
    limit_s, ending, patience_s = usual if run.waiting_for == READING else _PHASES.get(run.phase, usual)
    waiting_for = run.waiting_for
    if run.phase == "training":
        waiting_for = run.waiting_for or "the trainer to take the step"
    yield Wait(
        waiting_for,
        run.trainer_said if run.phase == "training" else "",
        since_s=run.since_s,
        limit_s=limit_s,
        ending=ending,
        patience_s=patience_s,
    )


_BEFORE_ROLLOUTS = frozenset({"starting", "gathering", "ending"})
_LOAD_PHASES = frozenset({"loading", "publishing", "collecting"})
"""Phases in which a run may wait for engines to load a version."""
_STOP = "no bound: stop the job"
_PHASES: Mapping[str, tuple[float | None, str, float]] = {
    "starting": (deadlines.WORKERS_ATTACH_S, "the job fails", UNUSUAL_S),
    "gathering": (deadlines.NODES_ATTACH_S, "the job fails", UNUSUAL_S),
    "loading": (None, "no bound as long as workers report progress: stop the job", UNUSUAL_S),
    "recovering": (deadlines.REDIS_S, "the job fails", UNUSUAL_S),
    "collecting": (None, _STOP, USUAL_S),
    "training": (None, f"the trainer counts as lost after {duration(deadlines.TRAIN_SILENCE_S)} of silence", USUAL_S),
    "publishing": (deadlines.EXPORT_S + deadlines.ACTIVATE_S, "the run loads its newest checkpoint", USUAL_S),
    "evaluating": (None, _STOP, USUAL_S),
    "saving": (deadlines.CHECKPOINT_S, "the run loads its newest checkpoint", USUAL_S),
    "paused": (None, "no bound: resume the job, or stop it", USUAL_S),
    "ending": (deadlines.STOP_JOB_S, "the job ends without them", UNUSUAL_S),
}
"""By phase: how long it waits, what happens then, and when people are told."""
_RULES: tuple[Rule, ...] = (
    workers_that_are_silent,
    rollouts_that_are_not_there,
    workers_that_load_the_job,
    engines_that_serve_nothing,
    engines_that_fail_to_load,
    what_rollouts_wait_for,
    groups_that_do_not_fail,
    groups_that_a_filter_keeps,
    engines_that_are_behind,
    the_evaluation,
    what_the_phase_waits_for,
)
