"""Which replica trains on which of a rollout's samples, in which optimizer step and micro-batch: indices alone.

Rank 0 computes it and the others are told, because it takes every sample's tokens and routed experts, of which another
rank gets its own only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from miles.services.trainer.batch.balance import MicroBatchLimits, recut, schedule
from miles.telemetry.tracing import traced
from miles.types import Sample, SampleStatus

if TYPE_CHECKING:
    from miles.config import JobConfig

Cut = tuple[tuple[int, ...], ...]
"""One replica's micro-batches: the samples of each."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepSchedule:
    """One optimizer step."""

    num_samples: int
    """Samples of the step, untrained ones included."""
    num_trained: int
    """Those of them that are trained on."""
    num_tokens: int
    """Trained tokens."""
    micro_batches: tuple[Cut, ...]
    """Of each replica; the same number for all."""
    observed: tuple[Cut, ...]
    """Of each replica those of samples without gradient; the same number for all."""
    joined: frozenset[int] = frozenset()
    """Samples without gradient that are in `micro_batches` all the same."""


@dataclasses.dataclass(frozen=True, slots=True)
class RolloutSchedule:
    """One rollout."""

    steps: tuple[StepSchedule, ...]
    log_prob_micro_batches: tuple[Cut, ...] | None
    """Of each replica those for passes without gradients; None where they are those of the steps."""

    def share(self, replica: int) -> tuple[int, ...]:
        """The samples of a replica, in packed order."""
        cuts = (cut for step in self.steps for cut in (step.micro_batches[replica], step.observed[replica]))
        return tuple(i for cut in cuts for indices in cut for i in indices)

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self), default=sorted)

    @classmethod
    def from_json(cls, text: str) -> RolloutSchedule:
        """Read what `to_json` has written."""
        found = json.loads(text)
        cuts = found["log_prob_micro_batches"]
        return cls(tuple(map(_step_from_json, found["steps"])), None if cuts is None else _cuts_from_json(cuts))


@traced("schedule rollout")
def schedule_rollout(
    samples: Sequence[Sample],
    config: JobConfig,
    replicas: int,
    without_gradient: Collection[int] = (),
    joined_tokens: int = 0,
) -> RolloutSchedule:
    """Split the samples into optimizer steps, and each step's over replicas and into micro-batches.

    `samples` are as `in_order` gives them, `without_gradient` indices of those whose gradient is known to be zero.
    These have micro-batches of their own, or join the others where that takes no more micro-batches than the others
    alone on any replica and they have at most `joined_tokens` tokens in an optimizer step.
    Raises ValueError when they do not make up num_steps_per_rollout times global_batch_size.
    """
    train = config.train
    size, count = train.global_batch_size, train.num_steps_per_rollout
    if len(samples) != size * count:
        raise ValueError(
            f"the rollout's groups hold {len(samples)} samples, but num_steps_per_rollout × global_batch_size = "
            f"{count} × {size} = {size * count}"
        )
    tokens = _tokens_of_replica(config, train.max_tokens_per_gpu)
    limits = MicroBatchLimits(
        train.micro_batch_size, tokens if train.use_dynamic_batch_size else None, padded=train.qkv_format == "bshd"
    )

    def scheduled(members: Sequence[int]) -> tuple[Cut, ...]:
        cuts = schedule(samples, members, replicas, limits, share_prompts=train.share_prompts)
        return tuple(tuple(cut) for cut in cuts)

    steps = []
    for step in range(count):
        trained = [i for i in range(step * size, (step + 1) * size) if is_trained(samples[i])]
        idle = [i for i in trained if i in without_gradient]
        own = scheduled([i for i in trained if i not in without_gradient])
        joined: frozenset[int] = frozenset()
        if idle and sum(len(samples[i].tokens) for i in idle) <= joined_tokens:
            together = scheduled(trained)
            if len(together[0]) <= max(1, len(own[0])):
                own, joined, idle = together, frozenset(idle), []
        steps.append(
            StepSchedule(
                num_samples=size,
                num_trained=len(trained),
                num_tokens=sum(trained_tokens(samples[i]) for i in trained),
                micro_batches=own,
                observed=scheduled(idle),
                joined=joined,
            )
        )
    return _with_log_prob_cuts(RolloutSchedule(tuple(steps), None), samples, config, replicas)


def is_trained(sample: Sample) -> bool:
    """Whether any token of the sample enters the loss."""
    return sample.status is not SampleStatus.FAILED and not sample.remove_sample and trained_tokens(sample) > 0


def trained_tokens(sample: Sample) -> int:
    """Response tokens that the loss mask leaves."""
    return sample.response_length if sample.loss_mask is None else int(sample.loss_mask.sum(dtype=np.int64))


def _with_log_prob_cuts(
    found: RolloutSchedule, samples: Sequence[Sample], config: JobConfig, replicas: int
) -> RolloutSchedule:
    """Passes without gradients have the training micro-batches unless a limit of their own is set."""
    train = config.train
    limit = train.log_probs_max_tokens_per_gpu
    if not train.use_dynamic_batch_size or limit in (None, train.max_tokens_per_gpu):
        return found
    limits = MicroBatchLimits(1, _tokens_of_replica(config, limit), padded=train.qkv_format == "bshd")
    shares = [found.share(replica) for replica in range(replicas)]
    cuts = recut(samples, shares, limits, share_prompts=train.share_prompts)
    return dataclasses.replace(found, log_prob_micro_batches=tuple(tuple(cut) for cut in cuts))


def _tokens_of_replica(config: JobConfig, tokens_per_gpu: int | None) -> int | None:
    """Context-parallel ranks share a micro-batch's tokens."""
    return None if tokens_per_gpu is None else tokens_per_gpu * config.megatron.context_parallel_size


def _step_from_json(found: dict[str, object]) -> StepSchedule:
    cuts = {name: _cuts_from_json(found.pop(name)) for name in ("micro_batches", "observed")}
    joined = frozenset(found.pop("joined"))  # type: ignore[call-overload]
    return StepSchedule(**found, **cuts, joined=joined)  # type: ignore[arg-type]


def _cuts_from_json(cuts: object) -> tuple[Cut, ...]:
    return tuple(tuple(tuple(indices) for indices in cut) for cut in cuts)  # type: ignore[attr-defined]
