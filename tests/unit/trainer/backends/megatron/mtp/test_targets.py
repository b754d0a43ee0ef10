"""What MTP layers read and predict, on every rank of a layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainer_cases import random_groups

from miles.services.trainer.backends.megatron.mtp.targets import layer_tokens, trained_tokens
from miles.services.trainer.backends.megatron.parallel.rows import PADDING, LocalRows, local_rows, padded_rows
from miles.services.trainer.batch.packing import EMPTY, MicroBatch, pack
from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan, RolloutBatch, in_order, response_mask
from miles.types import Sample


def masked_samples(seed: int) -> tuple[Sample, ...]:
    """Some have loss masks."""
    random = np.random.default_rng(seed)
    found = []
    for sample in in_order(random_groups(seed)):
        mask = random.integers(0, 2, sample.response_length).astype(np.uint8)
        found.append(dataclasses.replace(sample, loss_mask=mask if random.random() < 0.7 else None))
    return tuple(found)


def expected(samples: tuple[Sample, ...], micro_batch: MicroBatch, layer: int) -> set[tuple[int, int, int]]:
    """(sample, position of the row, predicted token), of tokens that are trained on and far enough from the start."""
    found = set()
    for index in micro_batch.samples:
        sample = samples[index]
        for offset in np.flatnonzero(response_mask(sample)):
            position = sample.prompt_length + int(offset)
            if position > layer:
                found.add((index, position - layer - 1, int(sample.tokens[position])))
    return found


@given(
    seed=st.integers(0, 2**16),
    chosen=st.lists(st.integers(0, 15), min_size=1, max_size=6, unique=True),
    ranks=st.sampled_from([1, 2, 4, None]),
    layer=st.integers(1, 3),
)
def test_every_trained_token_is_predicted_once_from_its_own_sample(
    seed: int, chosen: list[int], ranks: int | None, layer: int
) -> None:
    samples = masked_samples(seed)
    micro_batch = pack(samples, chosen, share_prompts=False)
    trained_R = np.concatenate([response_mask(samples[i]) for i in chosen]).astype(bool)
    parts: list[LocalRows]
    if ranks is None:
        parts = [padded_rows(micro_batch, multiple_of=4)]
    else:
        parts = [local_rows(micro_batch, context_rank=r, context_size=ranks, multiple_of=2) for r in range(ranks)]
    found = []
    for part in parts:
        tokens = layer_tokens(micro_batch, part, trained_R, layer)
        for row, target in zip(tokens.rows_P, tokens.targets_P, strict=True):
            sample, position = micro_batch.row_sources_T[part.sources_L[row]]
            found.append((int(sample), int(position), int(target)))
        for row, source in enumerate(part.sources_L):
            if source == PADDING:
                assert tokens.input_ids_L[row] == 0
                continue
            sample, position = micro_batch.row_sources_T[source]
            whole = samples[sample].tokens
            assert tokens.input_ids_L[row] == (whole[position + layer] if position + layer < len(whole) else 0)
    assert len(found) == len(set(found))
    assert set(found) == expected(samples, micro_batch, layer)


def test_a_micro_batch_without_samples_predicts_nothing() -> None:
    rows = local_rows(EMPTY, context_rank=1, context_size=2, multiple_of=2)
    tokens = layer_tokens(EMPTY, rows, np.zeros(0, bool), 1)
    assert len(tokens.rows_P) == len(tokens.targets_P) == 0
    assert not tokens.input_ids_L.any()


@pytest.mark.parametrize("joined", [frozenset(), frozenset({1})])
def test_samples_that_only_join_a_pass_are_not_trained(joined: frozenset[int]) -> None:
    samples = masked_samples(5)
    micro_batch = pack(samples, [0, 1, 2], share_prompts=False)
    step = OptimizerStepPlan(3, 3, 17, (micro_batch,), (), joined)
    batch = RolloutBatch(samples, (step,), (micro_batch,), (0, 1, 2), None, share_prompts=False)  # type: ignore[arg-type]
    trained = trained_tokens(batch, step)
    assert trained.count == 17
    parts = np.split(trained.mask(micro_batch), micro_batch.cu_responses[1:-1])
    for index, part in enumerate(parts):
        assert part.tolist() == (response_mask(samples[index]).astype(bool) & (index not in joined)).tolist()
    assert trained.mask(EMPTY).tolist() == []
