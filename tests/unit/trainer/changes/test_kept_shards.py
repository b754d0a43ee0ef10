"""What a rank keeps of its shards."""

from __future__ import annotations

import pytest
import torch

from miles.services.trainer.changes.kept_shards import KeptShards, Shard
from miles.services.trainer.changes.shard_change import apply_change


def shard(elements: torch.Tensor, name: str = "w") -> Shard:
    return Shard(name, (elements.numel(),), 0, elements)


def test_changes_add_up_to_the_shard_as_it_is_now() -> None:
    kept, far = KeptShards(), torch.zeros(300)
    elements = torch.zeros(300)
    kept.take(shard(elements))
    for step in range(5):
        elements[step::50] += step + 1.0
        apply_change(kept.update(shard(elements)), far)
        assert far.equal(elements)
    assert kept.update(shard(elements)).count == 0
    assert kept.nbytes == 1200


def test_what_is_kept_is_a_copy_and_follows_the_type() -> None:
    kept, elements = KeptShards(), torch.zeros(10)
    kept.take(shard(elements))
    elements[3] = 1.0
    assert kept.has_changed(shard(elements))
    assert not kept.has_changed(shard(elements))
    assert kept.has_changed(shard(elements.bfloat16())), "another type has other bytes"
    assert kept.has_changed(shard(elements[:5].bfloat16()))
    assert kept.nbytes == 10


def test_not_a_number_is_not_a_change() -> None:
    kept, elements = KeptShards(), torch.full((4,), float("nan"))
    assert kept.has_changed(shard(elements))
    assert not kept.has_changed(shard(elements.clone()))
    assert kept.update(shard(elements.clone())).count == 0


def test_only_a_shard_that_is_kept_can_be_compared() -> None:
    with pytest.raises(KeyError):
        KeptShards().update(shard(torch.zeros(1)))
