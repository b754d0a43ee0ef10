from __future__ import annotations

import torch

from miles.services.trainer.drafts.host_copy import HostCopy


def test_copies_are_contiguous_and_stay_as_they_were_until_the_next() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor(7), "c": torch.randn(300).bfloat16()}
    host_copy = HostCopy(torch.device("cpu"))
    found = host_copy.of(tensors)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
    assert all(each.is_contiguous() and each.equal(expected[name]) for name, each in found.items())
    memory = {each.data_ptr() for each in found.values()}
    again = host_copy.of(tensors)
    assert {each.data_ptr() for each in again.values()} == memory
    assert all(not each.any() for each in again.values())
