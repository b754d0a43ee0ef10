"""The engine's experts as rows: those of each row's token, in the type and the memory that they came in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trainer_cases import random_groups

from miles.services.trainer.batch.packing import pack
from miles.services.trainer.batch.replayed_experts import rollout_routing
from miles.services.trainer.batch.rollout_batch import in_order

ROUTING = (8, 3, 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("share_prompts", [True, False])
def test_each_row_has_the_experts_of_its_token(dtype: type, share_prompts: bool) -> None:
    samples = in_order(random_groups(3, routing=ROUTING))
    for sample in samples:
        assert sample.rollout_routed_experts is not None
        sample.rollout_routed_experts = sample.rollout_routed_experts.astype(dtype)
    micro_batch = pack(samples, range(len(samples)), share_prompts=share_prompts)
    routed = rollout_routing(samples, micro_batch)
    assert routed.numpy().dtype == dtype
    for row, (index, position) in enumerate(micro_batch.row_sources_T):
        expected = samples[index].rollout_routed_experts
        assert expected is not None
        assert (routed[row].numpy() == expected[position]).all()


def test_a_rank_may_ask_for_its_rows_alone_with_padding_between_them() -> None:
    samples = in_order(random_groups(3, routing=ROUTING))
    micro_batch = pack(samples, range(len(samples)), share_prompts=False)
    every = rollout_routing(samples, micro_batch)
    rows = np.array([-1, -1, 5, 6, 7, 2, -1, micro_batch.num_rows - 1, 0])
    some = rollout_routing(samples, micro_batch, rows)
    assert torch.equal(some[rows >= 0], every[rows[rows >= 0]])
    assert (some[rows < 0].numpy() == np.arange(ROUTING[2])).all()
