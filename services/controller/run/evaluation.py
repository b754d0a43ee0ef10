"""One evaluation: fixed prompts, an exact policy version, and the resulting metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from miles.config.eval_sets import eval_sets
from miles.rpc.gen import rollout_pb2
from miles.services.controller.clients.calls import WorkerFailedError
from miles.services.controller.run.group_leases import GroupLease, GroupLeases
from miles.services.controller.run.lease_messages import evaluation_lease
from miles.services.controller.status.run_waits import EvaluationFacts
from miles.telemetry.pass_at_k import pass_rates
from miles.types import Reward, Sample, SampleStatus, reward_number
from miles.types.convert import group_from_proto

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.data import PromptSource

_MAX_FAILURES = 5


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredResponse:
    """What metrics take of a sample; its tokens and texts would add up over a data set."""

    reward: Reward | None
    response_length: int
    status: SampleStatus
    error: str
    """Why it has no reward."""

    @classmethod
    def of(cls, sample: Sample) -> ScoredResponse:
        """Take it from a sample."""
        error = str(sample.metadata.get("reward_error", "its reward failed"))
        return cls(sample.reward, sample.response_length, sample.status, error)


class Evaluation:
    """Leases the groups of an evaluation and collects their results.

    Group ids count through all data sets, apart from those of training groups.
    """

    def __init__(
        self,
        job_id: str,
        config: JobConfig,
        datasets: Mapping[str, PromptSource],
        version: int,
        attempts_before: int = 0,
    ) -> None:
        """`attempts_before`: highest attempt of any earlier evaluation, so that its late results are recognised."""
        self._job_id = job_id
        self._config = config
        self.version = version
        self._datasets = datasets
        self._sets = {each.name: each for each in eval_sets(config.to_flat())}
        self._prompts = [(name, index) for name, source in datasets.items() for index in range(len(source))]
        self._pending = list(range(len(self._prompts)))
        self.leases = GroupLeases()
        """Groups being generated now."""
        self._failures: Counter[int] = Counter()
        self._last_failure = ""
        self.warnings: list[str] = []
        """What people should know of the result; filled in when it is done."""
        self._attempts = [attempts_before] * len(self._prompts)
        self._results: dict[int, list[ScoredResponse]] = {}
        self._done: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()

    @property
    def attempts(self) -> int:
        """The highest number of an attempt so far."""
        return max(self._attempts, default=0)

    def facts(self) -> EvaluationFacts:
        """Return how far it is."""
        return EvaluationFacts(self.version, len(self._results), len(self._prompts), self._last_failure)

    async def wait(self) -> dict[str, float]:
        """Return the metrics once every group is finished."""
        return await asyncio.shield(self._done)

    def lease(self, worker_id: str) -> rollout_pb2.GroupLease | None:
        """Lease the next group to a worker; None when none is waiting."""
        if not self._pending:
            return None
        group_id = heapq.heappop(self._pending)
        self._attempts[group_id] += 1
        attempt = self._attempts[group_id]
        self.leases.begin(group_id, GroupLease(worker_id, attempt))
        name, index = self._prompts[group_id]
        group = self._datasets[name].group(self._job_id, index, 1)
        group.group_id = group.samples[0].group_id = group_id
        return evaluation_lease(self._config, self._sets[name], group, attempt, self.version)

    def finish(self, message: rollout_pb2.GroupFinished) -> None:
        """Take in a finished group; results of older attempts are ignored."""
        if self.leases.end(message.group_id, message.attempt):
            self._results[message.group_id] = [
                ScoredResponse.of(sample) for sample in group_from_proto(message.group).samples
            ]
            if len(self._results) == len(self._prompts) and not self._done.done():
                self._done.set_result(self._metrics())

    def fail(self, group_id: int, attempt: int, error: str) -> None:
        """Retry a group that failed; after a few times the evaluation fails."""
        if self.leases.end(group_id, attempt):
            heapq.heappush(self._pending, group_id)
            self._failures[group_id] += 1
            self._last_failure = error
            if self._failures[group_id] >= _MAX_FAILURES and not self._done.done():
                name, _ = self._prompts[group_id]
                times = self._failures[group_id]
                self._done.set_exception(
                    WorkerFailedError(f"evaluation on {name}: prompt {group_id} failed {times} times; last: {error}")
                )

    def requeue(self, group_id: int, attempt: int) -> None:
        """End a lease without a result; the group will be leased again."""
        if self.leases.end(group_id, attempt):
            heapq.heappush(self._pending, group_id)

    def lose_worker(self, worker_id: str) -> None:
        """End every lease of a lost worker; its groups will be leased again."""
        for group_id in self.leases.lose_worker(worker_id):
            heapq.heappush(self._pending, group_id)

    def _metrics(self) -> dict[str, float]:
        key = self._config.reward.eval_reward_key
        metrics: dict[str, float] = {}
        names = list(dict.fromkeys(name for name, _ in self._prompts))
        for name in names:
            groups = [self._results[i] for i, (owner, _) in enumerate(self._prompts) if owner == name]
            rewards = [[_reward(sample, key) for sample in group] for group in groups]
            samples = [sample for group in groups for sample in group]
            failed = [sample for sample in samples if sample.reward is None]
            if failed:
                self.warnings.append(_failed_words(name, failed, len(samples)))
                metrics[f"eval/{name}/failed_ratio"] = len(failed) / len(samples)
            if len(failed) == len(samples):
                continue  # nothing was measured, and 0 would be taken for a measurement
            metrics[f"eval/{name}"] = float(np.mean([reward for group in rewards for reward in group]))
            metrics[f"eval/{name}/weight_version"] = float(self.version)
            metrics[f"eval/{name}/response_len/mean"] = float(np.mean([s.response_length for s in samples]))
            metrics[f"eval/{name}/truncated_ratio"] = float(
                np.mean([s.status is SampleStatus.TRUNCATED for s in samples])
            )
            metrics |= pass_rates(rewards, self._sets[name].n_samples, f"passrate/{name}/")
        return metrics


def _reward(sample: ScoredResponse, key: str | None) -> float:
    """A sample's reward; 0 for one that has none, because it failed."""
    return 0.0 if sample.reward is None else reward_number(sample.reward, key)


def _failed_words(name: str, failed: Sequence[ScoredResponse], samples: int) -> str:
    """Say how many samples have no reward, and why."""
    counted = "it has no score" if len(failed) == samples else "they count as 0"
    return f"evaluation on {name}: {len(failed)} of {samples} samples have no reward, {counted}; e.g. {failed[0].error}"
