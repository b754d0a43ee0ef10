"""Room for keys and values."""

from __future__ import annotations

import pytest
import torch

from miles.services.rollout.engines.torch.model.kv_cache import KVCache, attention_length


def make(max_slots: int = 8, max_length: int = 300) -> KVCache:
    return KVCache(
        layers=2,
        kv_heads=3,
        head_dim=4,
        max_slots=max_slots,
        max_length=max_length,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_values_may_be_of_another_width_than_keys() -> None:
    sizes = {"layers": 1, "kv_heads": 2, "head_dim": 6, "value_dim": 4, "max_slots": 2, "max_length": 64}
    cache = KVCache(**sizes, dtype=torch.float32, device=torch.device("cpu"))
    cache.reserve(1, 3)
    keys, values = torch.randn(1, 2, 6), torch.randn(1, 2, 4)
    cache.write(0, torch.tensor([0]), torch.tensor([2]), keys, values)
    cache.reserve(2, 64)
    assert torch.equal(cache.keys_LSHDT[0, 0, ..., 2], keys[0])
    assert torch.equal(cache.values_LSHTD[0, 0, :, 2], values[0])


def test_room_grows_in_steps_of_64_positions_and_keeps_what_was_written() -> None:
    cache = make()
    cache.reserve(1, 3)
    assert (cache.slots, cache.length) == (1, 64)
    keys, values = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    cache.write(1, torch.tensor([0, 0]), torch.tensor([5, 63]), keys, values)
    cache.reserve(3, 65)
    assert (cache.slots, cache.length) == (3, 128)
    cache.reserve(2, 200)
    assert (cache.slots, cache.length) == (3, 384)
    cache.reserve(8, 300)
    assert (cache.slots, cache.length) == (8, 384)
    assert torch.equal(cache.keys_LSHDT[1, 0, :, :, [5, 63]].permute(2, 0, 1), keys)
    assert torch.equal(cache.values_LSHTD[1, 0, :, [5, 63]].transpose(0, 1), values)
    assert cache.keys_LSHDT.count_nonzero() == keys.numel()


def test_sums_over_values_do_not_depend_on_what_is_spanned_beyond_them() -> None:
    weights_RT, values_TD = torch.rand(16, 1024), torch.randn(1024, 16)
    for seen in (60, 64, 65, 190, 200, 256, 300, 384, 385, 500, 640):
        weights_RT[:, seen:] = 0
        lengths = {attention_length(positions) for positions in range(seen, 1024, 7)}
        assert min(lengths) >= seen
        sums = [weights_RT[:, :length] @ values_TD[:length] for length in lengths]
        assert all(torch.equal(each, sums[0]) for each in sums)
        weights_RT = torch.rand(16, 1024)


def test_copies_take_the_first_positions_of_a_slot() -> None:
    cache = make()
    cache.reserve(3, 64)
    cache.write(0, torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.randn(4, 3, 4), torch.randn(4, 3, 4))
    cache.copy(0, [1, 2], 3)
    for slot in (1, 2):
        assert torch.equal(cache.keys_LSHDT[:, slot, ..., :3], cache.keys_LSHDT[:, 0, ..., :3])
        assert cache.keys_LSHDT[:, slot, ..., 3:].count_nonzero() == 0
        assert torch.equal(cache.values_LSHTD[:, slot, :, :3], cache.values_LSHTD[:, 0, :, :3])


def test_more_than_the_most_is_refused() -> None:
    cache = make(max_slots=2, max_length=100)
    with pytest.raises(ValueError, match="asked for 3 slots of 1 positions; the cache has at most 2 of 128"):
        cache.reserve(3, 1)
    with pytest.raises(ValueError, match="asked for 1 slots of 129"):
        cache.reserve(1, 129)
