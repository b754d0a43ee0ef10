"""What a run's drafts are good for: by engine and pair of versions, step by step."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from miles.config import JobConfig
from miles.config.speculation import DraftKind, speculation_of
from miles.rpc.gen import controller_pb2, rollout_pb2
from miles.services.controller.speculation.advice import DraftSetup
from miles.services.controller.speculation.alarm import AcceptanceAlarm
from miles.services.controller.speculation.draft_counts import DraftCounts, Versions, total
from miles.services.controller.speculation.engine_counters import EngineCounters, counts_of
from miles.services.controller.speculation.switches import DraftSwitches

MOST_VERSIONS = 32
"""Pairs of versions that are kept, of each engine and in the job's summary: the newest."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepNews:
    """What a step's drafts were good for."""

    metrics: dict[str, float]
    """By name (docs/speculation.md); empty without speculative decoding."""
    warnings: list[str]
    events: list[str]
    """What people may want to know."""


class RunAcceptance:
    """Gets reports of engines as they come, and the end of each step."""

    def __init__(self, setup: DraftSetup, alarm_at: float, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """`earlier`: what `by_versions` returned in an earlier life of the job."""
        self._alarm = AcceptanceAlarm(setup, alarm_at)
        self._switches = DraftSwitches()
        self._counters: dict[str, EngineCounters] = defaultdict(EngineCounters)
        self._now: dict[str, rollout_pb2.SpeculationProgress] = {}
        """How engines draft, of those that are there."""
        self._step: dict[str, dict[Versions, DraftCounts]] = {}
        self._found = self._missed = 0
        """Prompts of the step with earlier responses, and without."""
        self._by_engine: dict[str, dict[Versions, DraftCounts]] = {}
        self._by_versions: dict[Versions, DraftCounts] = {}
        for each in earlier:
            counts = DraftCounts(each["verifications"], each["proposed"], each["accepted"])
            _add(self._by_versions, {Versions(each["policy_version"], each["draft_version"]): counts})

    @classmethod
    def of_job(cls, config: JobConfig, earlier: Iterable[Mapping[str, Any]] = ()) -> RunAcceptance:
        """Build it for a job; see `__init__`."""
        speculation = speculation_of(config.rollout.sglang_args)
        trained = config.drafts.enable_draft_training and speculation.has_weights
        if speculation.kind is DraftKind.MTP:
            trained = config.megatron.enable_mtp_training
        return cls(DraftSetup(speculation, trained), config.drafts.draft_acceptance_alarm, earlier)

    def note(self, worker_id: str, incarnation: str, progress: rollout_pb2.SpeculationProgress) -> None:
        """Take in a report of an engine, which lives in the process `incarnation` of its worker."""
        self._now[worker_id] = progress
        counters = self._counters[worker_id]
        new = counters.note(incarnation, counts_of(progress))
        found, missed = counters.note_prompts(progress.prompts_with_responses, progress.prompts_without_responses)
        self._found += found
        self._missed += missed
        if new:
            _add(self._step.setdefault(worker_id, {}), new)
            _add(self._by_engine.setdefault(worker_id, {}), new)
            _add(self._by_versions, new)

    def lose(self, worker_id: str) -> None:
        """An engine is gone; what it counted stays."""
        self._now.pop(worker_id, None)

    def finish_step(self, step: int) -> StepNews:
        """End a step: return what it counted, and what people are to be told."""
        counts, self._step = self._step, {}
        off = {engine for engine, now in self._now.items() if now.reason and not now.num_steps}
        warnings, events = self._alarm.note(step, counts, off)
        events += self._switches.note(step, sorted(self._now.items()))
        return StepNews(self._metrics(counts), warnings, events)

    def _metrics(self, counts: Mapping[str, Mapping[Versions, DraftCounts]]) -> dict[str, float]:
        by_engine = {engine: total(by_versions.values()) for engine, by_versions in sorted(counts.items())}
        metrics = _acceptance("", total(by_engine.values()))
        for engine, counted in by_engine.items():
            metrics |= _acceptance(f"/{engine}", counted)
        engines = sorted(self._now.items())
        metrics |= {f"speculative/num_steps/{engine}": float(now.num_steps) for engine, now in engines}
        served = {engine: float(now.draft_version) for engine, now in engines if now.HasField("draft_version")}
        if served:
            metrics["speculative/draft_version"] = min(served.values())
            metrics |= {f"speculative/draft_version/{engine}": version for engine, version in served.items()}
        speedups = {engine: now.speedup for engine, now in engines if now.speedup > 0}
        if speedups:
            metrics["speculative/speedup"] = statistics.fmean(speedups.values())
            metrics |= {f"speculative/speedup/{engine}": speedup for engine, speedup in speedups.items()}
        if asked := self._found + self._missed:
            metrics["speculative/earlier_responses"] = self._found / asked
        self._found = self._missed = 0
        return metrics

    def engines(self) -> list[controller_pb2.EngineSpeculation]:
        """Describe every engine, by id: how it drafts, and what it counted since the run began."""
        described = []
        for engine in sorted({*self._now, *self._by_engine}):
            progress = rollout_pb2.SpeculationProgress()
            if engine in self._now:
                progress.CopyFrom(self._now[engine])
            del progress.counts[:]
            counted = self._by_engine.get(engine, {})
            progress.counts.extend(counts.to_proto(versions) for versions, counts in counted.items())
            described.append(controller_pb2.EngineSpeculation(worker_id=engine, progress=progress))
        return described

    def by_versions(self) -> list[dict[str, Any]]:
        """Return what all engines counted, by pair of versions, the newest of them, oldest first; for JSON.

        The keys are those of `VersionAcceptance` in the REST API.
        """
        return [
            {
                "policy_version": versions.policy,
                "draft_version": versions.draft,
                "verifications": counts.verify_count,
                "proposed": counts.proposed,
                "accepted": counts.accepted,
                "accept_length": counts.accept_length,
                "accept_rate": counts.accept_rate,
            }
            for versions, counts in self._by_versions.items()
        ]


def _add(kept: dict[Versions, DraftCounts], new: Mapping[Versions, DraftCounts]) -> None:
    """Add counts in place; pairs that were counted last come last, and too many lose the first."""
    for versions, counts in new.items():
        kept[versions] = kept.pop(versions, DraftCounts()) + counts
    while len(kept) > MOST_VERSIONS:
        del kept[next(iter(kept))]


def _acceptance(suffix: str, counts: DraftCounts) -> dict[str, float]:
    values = {"accept_length": counts.accept_length, "accept_rate": counts.accept_rate}
    return {f"speculative/{name}{suffix}": value for name, value in values.items() if value is not None}
