"""Which samples of a training step are recorded: whole ones, chosen at random, as many as there is room for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from miles.services.trainer.batch.rollout_schedule import StepSchedule
from miles.types import Sample


def choose(samples: Sequence[Sample], step: StepSchedule, budget: int, seed: Sequence[int]) -> tuple[int, ...]:
    """Indices of the samples, ascending, of an optimizer step; every rank that is given the same finds the same.

    Replicas take turns, each with its samples in random order; one that does not fit into what is left of the `budget`
    of tokens is passed over.
    """
    rng = np.random.default_rng(seed)
    shares = [_share(step, replica) for replica in range(len(step.micro_batches))]
    mixed = [[share[place] for place in rng.permutation(len(share))] for share in shares]
    turns = [mixed[replica] for replica in rng.permutation(len(mixed))]
    chosen = []
    for index in itertools.chain.from_iterable(itertools.zip_longest(*turns)):
        if index is not None and len(samples[index].tokens) <= budget:
            budget -= len(samples[index].tokens)
            chosen.append(index)
    return tuple(sorted(chosen))


def indices_of(step: StepSchedule) -> list[int]:
    """All samples that are computed in an optimizer step."""
    return [index for replica in range(len(step.micro_batches)) for index in _share(step, replica)]


def _share(step: StepSchedule, replica: int) -> list[int]:
    cuts = (*step.micro_batches[replica], *step.observed[replica])
    return [index for indices in cuts for index in indices]
