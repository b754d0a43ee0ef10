from __future__ import annotations

import base64
import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.services.rollout.engines.sglang.weights.buckets import flatten, in_buckets, share_by_name


@given(sizes=st.lists(st.integers(0, 40), max_size=20), limit=st.integers(1, 100))
def test_buckets_hold_everything_in_order_and_keep_to_their_size(sizes: list[int], limit: int) -> None:
    tensors = [(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    parts = list(in_buckets(tensors, limit))
    assert [name for part in parts for name, _ in part] == [name for name, _ in tensors]
    for part in parts:
        assert len(part) == 1 or sum(tensor.nbytes for _, tensor in part) <= limit


def test_a_bucket_holds_its_tensors_bit_for_bit_and_another_process_can_read_it() -> None:
    share_by_name()
    tensors = [
        ("a", torch.randn(3, 5)),
        ("b", torch.randn(7, dtype=torch.float32).to(torch.bfloat16)),
        ("c", torch.tensor(2.5)),
        ("d", torch.arange(12, dtype=torch.float32).view(3, 4).t()),
        ("e", torch.empty(0)),
    ]
    bucket = flatten(tensors)
    read = pickle.loads(base64.b64decode(bucket.serialized()))  # as the server does, with its own unpickler
    for entry, (name, tensor) in zip(read["metadata"], tensors, strict=True):
        part = read["flattened_tensor"][entry.start_idx : entry.end_idx].view(entry.dtype).reshape(entry.shape)
        assert entry.name == name
        assert entry.numel == tensor.nbytes
        assert torch.equal(part, tensor)
