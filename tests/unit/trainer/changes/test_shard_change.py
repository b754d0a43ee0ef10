"""Changes of shards: found, packed and applied."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.services.trainer.changes.shard_change import (
    WHOLE,
    ShardChange,
    apply_change,
    bits,
    find_change,
    packed_size,
    whole,
)

DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool]


def random_bits(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (numel,), generator=generator).bool()
    return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


@settings(deadline=None)
@given(
    st.sampled_from(DTYPES), st.integers(0, 500), st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]), st.integers(0, 10_000)
)
def test_a_change_turns_old_elements_into_new_ones_bit_for_bit(
    dtype: torch.dtype, numel: int, share: float, seed: int
) -> None:
    old, other = random_bits(numel, dtype, seed), random_bits(numel, dtype, seed + 1)
    chosen = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < share
    new = old.clone()
    bits(new)[chosen] = bits(other)[chosen]
    change = find_change(old, new)
    assert change.data.numel() <= max(new.nbytes, 0)
    assert (change.count == 0) == bool((bits(old) == bits(new)).all())
    target = old.clone()
    apply_change(change, target)
    assert bits(target).equal(bits(new))


@settings(deadline=None, max_examples=40)
@given(st.sets(st.integers(0, 400_000), max_size=12))
def test_elements_that_lie_far_apart_are_reached_in_several_steps(places: set[int]) -> None:
    old = torch.zeros(400_001, dtype=torch.bfloat16)
    new = old.clone()
    new[sorted(places)] = 1.0
    change = find_change(old, new)
    assert len(places) <= change.count <= len(places) + 400_001 // 65_536
    target = old.clone()
    apply_change(change, target)
    assert target.equal(new)


@pytest.mark.parametrize("share", [0.01, 0.02, 0.05])
def test_a_changed_value_of_bfloat16_takes_four_bytes(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1 << 18, generator=generator).bfloat16()
    new = torch.where(torch.rand(1 << 18, generator=generator) < share, -old, old)
    changed = int((bits(old) != bits(new)).sum())
    assert find_change(old, new).data.numel() == 4 * changed < 2.2 * share * old.nbytes


def test_a_shard_that_changed_nearly_everywhere_goes_as_a_whole() -> None:
    old = torch.zeros(1000, dtype=torch.bfloat16)
    change = find_change(old, old + 1)
    assert (change.count, change.data.numel()) == (WHOLE, 2000)
    kept = whole(old)
    old += 1
    assert not kept.data.any(), "it is a copy"


def test_changes_can_be_read_from_bytes_that_are_not_aligned() -> None:
    old, new = torch.arange(64.0), torch.arange(64.0)
    new[5] = -1
    change = find_change(old, new)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), change.data])[1:]
    apply_change(ShardChange(change.count, shifted), old)
    assert old.equal(new)


@pytest.mark.parametrize(("count", "nbytes"), [(1, 3), (0, 4), (WHOLE, 19), (2, 11)])
def test_a_change_of_another_size_is_refused(count: int, nbytes: int) -> None:
    target = torch.zeros(10, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bytes instead of"):
        apply_change(ShardChange(count, torch.zeros(nbytes, dtype=torch.uint8)), target)


def test_a_change_beyond_the_shard_is_refused() -> None:
    change = find_change(torch.zeros(100), torch.cat([torch.zeros(99), torch.ones(1)]))
    assert change.data.numel() == packed_size(1, 100, 4)
    with pytest.raises(ValueError, match="element 99 of a shard of 50"):
        apply_change(change, torch.zeros(50))
