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
from miles.services.trainer.batch.packing import EMPTY, MicroBatch, pack
from miles.services.trainer.batch.rollout_schedule import Cut, RolloutSchedule, is_trained, schedule_rollout
from miles.telemetry.tracing import traced
from miles.types import Sample, SampleGroup, reward_number

if TYPE_CHECKING:
    from miles.config import JobConfig


SHAPED_REWARD = "shaped_reward"
"""Key of a sample's metadata with what custom_reward_post_process_path made of its reward."""


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
    """All samples of the rollout, by group id and index; those of other replicas may lack their routed experts."""
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

    def only(self, samples: Collection[int]) -> RolloutBatch:
        """The same batch with some of the rollout's samples in its passes without gradients.

        There are as many micro-batches as before, some of them empty: every rank still makes the same passes.
        """
        wanted = frozenset(samples)
        cut = [
            pack(self.samples, chosen, share_prompts=self.share_prompts)
            if (chosen := [i for i in micro_batch.samples if i in wanted])
            else EMPTY
            for micro_batch in self.log_prob_micro_batches
        ]
        return dataclasses.replace(self, log_prob_micro_batches=tuple(cut))

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

    def teacher_log_probs(self) -> torch.Tensor:
        """What servers of teachers gave for this rank's samples; float32 [T] on CPU, 0 for samples without training.

        Raises ValueError when a trained sample has none.
        """
        parts = [torch.zeros(0)]
        for i in self.mine:
            sample = self.samples[i]
            if sample.teacher_log_probs is None and is_trained(sample):
                raise ValueError(_unscored(sample, "teacher_log_probs"))
            known = sample.teacher_log_probs
            parts.append(torch.zeros(sample.response_length) if known is None else torch.tensor(known))
        return torch.cat(parts)

    def teacher_sets(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The tokens that servers of teachers scored, int32 [T, M], and their log-probabilities there, float32 [T, M].

        M is the same on every rank. Raises ValueError when a trained sample has none.
        """
        places = max([0, *(s.teacher_tokens.shape[1] for s in self.samples if s.teacher_tokens is not None)])
        ids = np.full((self.packing.num_tokens, places), -1, np.int32)
        log_probs = np.zeros((self.packing.num_tokens, places), np.float32)
        for position, i in enumerate(self.mine):
            sample = self.samples[i]
            if sample.teacher_tokens is None or sample.teacher_token_log_probs is None:
                if is_trained(sample):
                    raise ValueError(_unscored(sample, "teacher_token_log_probs"))
                continue
            rows = slice(self._starts[position], self._starts[position + 1])
            ids[rows, : sample.teacher_tokens.shape[1]] = sample.teacher_tokens
            log_probs[rows, : sample.teacher_tokens.shape[1]] = sample.teacher_token_log_probs
        return ids, log_probs

    def rollout_log_probs(self) -> torch.Tensor | None:
        """The engine's log-probabilities of this rank's samples; float32 [T] on CPU.

        None when a trained sample of the rollout, on any rank, lacks them.
        """
        if any(sample.rollout_log_probs is None for sample in self.samples if is_trained(sample)):
            return None
        values = [x for x in (self.samples[i].rollout_log_probs for i in self.mine) if x is not None]
        return torch.from_numpy(np.concatenate(values).astype(np.float32)) if values else torch.zeros(0)


def _unscored(sample: Sample, field: str) -> str:
    return f"sample {sample.index} of group {sample.group_id} has no {field}: no server of a teacher scored it"


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
    """Schedule a rollout and cut this replica's share, on a rank that has all samples; see `schedule_rollout`."""
    return cut_batch(samples, config, rank, schedule_rollout(samples, config, ranks, without_gradient, joined_tokens))


def cut_batch(samples: tuple[Sample, ...], config: JobConfig, rank: int, schedule: RolloutSchedule) -> RolloutBatch:
    """Cut a replica's share of a rollout into micro-batches; other samples need not have their routed experts."""
    share_prompts = config.train.share_prompts

    def packed(cut: Cut) -> tuple[MicroBatch, ...]:
        return tuple(pack(samples, indices, share_prompts=share_prompts) for indices in cut)

    plans = [
        OptimizerStepPlan(
            num_samples=step.num_samples,
            num_trained=step.num_trained,
            num_tokens=step.num_tokens,
            micro_batches=packed(step.micro_batches[rank]) or (EMPTY,),
            observed=packed(step.observed[rank]),
            joined=step.joined,
        )
        for step in schedule.steps
    ]
    cuts, mine = schedule.log_prob_micro_batches, schedule.share(rank)
    return RolloutBatch(
        samples=samples,
        steps=tuple(plans),
        log_prob_micro_batches=(
            tuple(micro_batch for plan in plans for micro_batch in plan.all_micro_batches)
            if cuts is None
            else packed(cuts[rank])
        ),
        mine=mine,
        packing=Packing(tuple(samples[i].response_length for i in mine)),
        share_prompts=share_prompts,
    )


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
