"""A rollout's samples cut for training: which are trained on, in which optimizer step and micro-batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from miles.algorithms.packing import Packing
from miles.services.trainer.batch.balance import MicroBatchLimits, recut, schedule
from miles.services.trainer.batch.packing import EMPTY, MicroBatch, pack
from miles.telemetry.tracing import traced
from miles.types import Sample, SampleGroup, SampleStatus, reward_number

if TYPE_CHECKING:
    from miles.config import JobConfig


@dataclasses.dataclass(frozen=True, slots=True)
class OptimizerStepPlan:
    """One optimizer step on this rank."""

    num_samples: int
    """Samples of the step on all ranks, untrained ones included: the denominator of the loss."""
    num_trained: int
    """Those of them that are trained on."""
    num_tokens: int
    """Trained tokens of the step on all ranks."""
    micro_batches: tuple[MicroBatch, ...]
    """This rank's share; the same number on every rank."""
    observed: tuple[MicroBatch, ...]
    """Micro-batches of samples without gradient, run only for their metrics; the same number on every rank."""
    joined: frozenset[int] = frozenset()
    """Samples without gradient that are in `micro_batches` all the same, which spares passes of their own."""

    @property
    def all_micro_batches(self) -> tuple[MicroBatch, ...]:
        """Both kinds, those with gradients last: after a pass without gradient FSDP keeps the parameters it gathered
        and would still use them once the optimizer has changed their shards."""
        return self.observed + self.micro_batches


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """One rollout's work on this rank. B: this rank's samples; T: their response tokens, sample after sample."""

    samples: tuple[Sample, ...]
    """All samples of the rollout, by group id and index."""
    steps: tuple[OptimizerStepPlan, ...]
    log_prob_micro_batches: tuple[MicroBatch, ...]
    """The same samples of this rank, cut for passes without gradients."""
    mine: tuple[int, ...]
    """Indices into `samples` of this rank's share, in packed order; B of them."""
    packing: Packing
    share_prompts: bool
    """Whether rows that samples have in common are in a micro-batch once."""

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """Micro-batches of all optimizer steps, in training order."""
        return [micro_batch for step in self.steps for micro_batch in step.all_micro_batches]

    def position(self, sample: int) -> int:
        """Position of a sample of the rollout among this rank's B samples."""
        return self._positions[sample]

    def token_indices(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Indices in T of the micro-batch's response tokens; int64 [R]."""
        firsts = [self._starts[self.position(i)] for i in micro_batch.samples]
        lengths = np.array([self.samples[i].response_length for i in micro_batch.samples], np.int64)
        before = np.cumsum([0, *lengths])[:-1]  # tokens of the micro-batch before each sample's
        shifts = np.repeat(np.array(firsts, np.int64) - before, lengths)
        return torch.from_numpy(shifts + np.arange(len(shifts)))

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.packing.lengths)]

    @functools.cached_property
    def _positions(self) -> dict[int, int]:
        return {sample: position for position, sample in enumerate(self.mine)}

    def apart(self, micro_batch: MicroBatch, joined: Collection[int]) -> tuple[MicroBatch, MicroBatch]:
        """The micro-batch's samples that are not joined, and those that are, in micro-batches of their own."""
        kinds = ([i for i in micro_batch.samples if (i in joined) is joins] for joins in (False, True))
        trained, observed = (pack(self.samples, indices, share_prompts=self.share_prompts) for indices in kinds)
        return trained, observed

    def masks(self) -> torch.Tensor:
        """Loss masks; float32 [T] on CPU."""
        if all(self.samples[i].loss_mask is None for i in self.mine):
            return torch.ones(self.packing.num_tokens)
        masks = [response_mask(self.samples[i]) for i in self.mine]
        return torch.from_numpy(np.concatenate(masks).astype(np.float32))

    def token_versions(self, newest: int) -> torch.Tensor:
        """Version of the policy that generated each of this rank's response tokens; int64 [T] on CPU.

        `newest` where a sample does not say.
        """
        versions = [response_versions(self.samples[i], newest) for i in self.mine]
        return torch.from_numpy(np.concatenate(versions)) if versions else torch.zeros(0, dtype=torch.int64)

    def versions(self, newest: int) -> list[int]:
        """Every version of a trained sample's token on any rank, ascending; `newest` as for `token_versions`."""
        found = {int(v) for s in self.samples if is_trained(s) for v in np.unique(response_versions(s, newest))}
        return sorted(found)

    def rollout_log_probs(self) -> torch.Tensor | None:
        """The engine's log-probabilities of this rank's samples; float32 [T] on CPU.

        None when a trained sample of the rollout, on any rank, lacks them.
        """
        if any(sample.rollout_log_probs is None for sample in self.samples if is_trained(sample)):
            return None
        values = [x for x in (self.samples[i].rollout_log_probs for i in self.mine) if x is not None]
        return torch.from_numpy(np.concatenate(values).astype(np.float32)) if values else torch.zeros(0)


def in_order(groups: Sequence[SampleGroup]) -> tuple[Sample, ...]:
    """All samples, by group id and index."""
    ordered = sorted(groups, key=lambda group: group.group_id)
    return tuple(s for group in ordered for s in sorted(group.samples, key=lambda s: s.index))


@traced("build batch")
def build_batch(
    samples: tuple[Sample, ...],
    config: JobConfig,
    rank: int,
    ranks: int,
    without_gradient: Collection[int] = (),
    joined_tokens: int = 0,
) -> RolloutBatch:
    """Split the samples into optimizer steps, and cut this rank's share into micro-batches.

    `samples` are as `in_order` gives them, `without_gradient` indices of those whose gradient is known to be zero.
    These have micro-batches of their own, or join the others where that takes no more micro-batches than the others
    alone and they have at most `joined_tokens` tokens in an optimizer step.
    Every rank computes the same schedule from the same samples. Raises ValueError when they do not make up
    num_steps_per_rollout times global_batch_size.
    """
    train = config.train
    size, steps = train.global_batch_size, train.num_steps_per_rollout
    if len(samples) != size * steps:
        raise ValueError(
            f"the rollout's groups hold {len(samples)} samples, but num_steps_per_rollout × global_batch_size = "
            f"{steps} × {size} = {size * steps}"
        )
    tokens = _tokens_of_replica(config, train.max_tokens_per_gpu)
    limits = MicroBatchLimits(train.micro_batch_size, tokens if train.use_dynamic_batch_size else None)
    plans: list[OptimizerStepPlan] = []
    all_shares: list[list[int]] = [[] for _ in range(ranks)]

    def scheduled(members: Sequence[int]) -> list[list[tuple[int, ...]]]:
        return schedule(samples, members, ranks, limits, share_prompts=train.share_prompts)

    def take(shares: Sequence[list[tuple[int, ...]]]) -> tuple[MicroBatch, ...]:
        for share, micro_batches in zip(all_shares, shares, strict=True):
            share.extend(i for indices in micro_batches for i in indices)
        return tuple(pack(samples, indices, share_prompts=train.share_prompts) for indices in shares[rank])

    for step in range(steps):
        trained = [i for i in range(step * size, (step + 1) * size) if is_trained(samples[i])]
        idle = [i for i in trained if i in without_gradient]
        own = scheduled([i for i in trained if i not in without_gradient])
        joined: frozenset[int] = frozenset()
        if idle and sum(len(samples[i].tokens) for i in idle) <= joined_tokens:
            together = scheduled(trained)
            if len(together[rank]) <= max(1, len(own[rank])):
                own, joined, idle = together, frozenset(idle), []
        plans.append(
            OptimizerStepPlan(
                num_samples=size,
                num_trained=len(trained),
                num_tokens=sum(_trained_tokens(samples[i]) for i in trained),
                micro_batches=take(own) or (EMPTY,),
                observed=take(scheduled(idle)),
                joined=joined,
            )
        )
    mine = tuple(all_shares[rank])
    return RolloutBatch(
        samples=samples,
        steps=tuple(plans),
        log_prob_micro_batches=_log_prob_micro_batches(samples, plans, all_shares, config, rank),
        mine=mine,
        packing=Packing(tuple(samples[i].response_length for i in mine)),
        share_prompts=train.share_prompts,
    )


def is_trained(sample: Sample) -> bool:
    """Whether any token of the sample enters the loss."""
    return sample.status is not SampleStatus.FAILED and not sample.remove_sample and _trained_tokens(sample) > 0


def _trained_tokens(sample: Sample) -> int:
    return sample.response_length if sample.loss_mask is None else int(sample.loss_mask.sum(dtype=np.int64))


def response_mask(sample: Sample) -> npt.NDArray[np.uint8]:
    """The loss mask of the response tokens; uint8 [response_length]."""
    return np.ones(sample.response_length, np.uint8) if sample.loss_mask is None else sample.loss_mask


def response_versions(sample: Sample, newest: int) -> npt.NDArray[np.int64]:
    """Version that generated each response token; int64 [response_length]. `newest` where the sample does not say."""
    versions = np.full(sample.response_length, newest, np.int64)
    for span in sample.weight_versions:
        versions[span.start : span.end] = span.version
    return versions


def trained_reward(sample: Sample, reward_key: str | None) -> float:
    """The number to train on. Raises ValueError when the sample has none, RewardKeyError when it has several."""
    if sample.reward is None:
        name = f"sample {sample.index} of group {sample.group_id}"
        raise ValueError(f"{name} has no reward; it must be scored, or its status FAILED")
    return reward_number(sample.reward, reward_key)


def _tokens_of_replica(config: JobConfig, tokens_per_gpu: int | None) -> int | None:
    """Context-parallel ranks share a micro-batch's tokens."""
    return None if tokens_per_gpu is None else tokens_per_gpu * config.megatron.context_parallel_size


def _log_prob_micro_batches(
    samples: Sequence[Sample],
    plans: Sequence[OptimizerStepPlan],
    shares: Sequence[Sequence[int]],
    config: JobConfig,
    rank: int,
) -> tuple[MicroBatch, ...]:
    """Micro-batches for passes without gradients; the training ones unless a limit of their own is set."""
    train = config.train
    limit = train.log_probs_max_tokens_per_gpu
    if not train.use_dynamic_batch_size or limit in (None, train.max_tokens_per_gpu):
        return tuple(micro_batch for plan in plans for micro_batch in plan.all_micro_batches)
    limits = MicroBatchLimits(1, _tokens_of_replica(config, limit))
    cut = recut(samples, shares, limits, share_prompts=train.share_prompts)
    return tuple(pack(samples, indices, share_prompts=train.share_prompts) for indices in cut[rank])
