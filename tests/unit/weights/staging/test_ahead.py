"""Versions copied ahead, with the memory of a CPU in place of a GPU's."""

from __future__ import annotations

import pytest
import torch

from miles.weights.staging.ahead import AheadOnDevice
from miles.weights.staging.ring import StagingRing

TENSORS = {
    "a": torch.randn(30, 10),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randn(10, 20).t(),
    "d": torch.empty(0, 3),
    "e": torch.tensor(2.5),
}


@pytest.mark.parametrize(("free", "copied"), [(1 << 20, True), (4000, False)])
def test_a_version_is_copied_where_there_is_room(free: int, copied: bool) -> None:
    ring = StagingRing(pin_memory=False, slot_bytes=256, slots=2)
    ahead = AheadOnDevice(torch.device("cpu"), ring, lambda device: free)
    for _ in range(2):
        got = ahead.copied(TENSORS)
        assert list(got) == list(TENSORS)
        for name, tensor in TENSORS.items():
            assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
            assert got[name].equal(tensor)
            assert (got[name] is tensor) is not copied
        assert len({tensor.untyped_storage().data_ptr() for tensor in got.values()}) == (1 if copied else len(TENSORS))
    ahead.close()


def test_a_device_that_fails_is_left_to_the_pause() -> None:
    ahead = AheadOnDevice(torch.device("vulkan"), StagingRing(pin_memory=False), lambda device: 1 << 60)
    assert ahead.copied(TENSORS) is TENSORS
    ahead.close()
