"""Versions as flat bytes: stretches, gaps, checksums, release."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from broadcast_kit import random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rpc.gen import policy_pb2
from miles.weights import flat as flats
from miles.weights import manifest as manifests
from miles.weights.bucketing import buckets
from miles.weights.check import check_weight_update_equal
from miles.weights.dtypes import wire_dtype
from miles.weights.manifest import ChecksumMismatch, ManifestError

THREADS = concurrent.futures.ThreadPoolExecutor(2)


KINDS = policy_pb2.ChecksumKind.values()


def filled(
    tensors: Mapping[str, torch.Tensor], bucket_bytes: int, kind: Any = policy_pb2.CHECKSUM_KIND_UNSPECIFIED
) -> tuple[dict[int, torch.Tensor], policy_pb2.Manifest]:
    """The tensors in one flat tensor per bucket, and their manifest."""
    descriptors, total = manifests.plan((name, wire_dtype(t.dtype), t.shape) for name, t in tensors.items())
    stretches = {}
    for bucket in buckets(descriptors, bucket_bytes):
        base, nbytes = flats.extent(bucket)
        flat = torch.full((nbytes,), 255, dtype=torch.uint8)
        flats.clear_gaps(flat, bucket)
        for descriptor, place in zip(bucket, flats.views(flat, bucket, base), strict=True):
            place.copy_(tensors[descriptor.name])
        flats.set_checksums(flat, bucket, base, THREADS, kind)
        if nbytes:
            stretches[base] = flat
    version = policy_pb2.WeightVersion(job_id="job", version=1)
    return stretches, manifests.build(version, descriptors, total, 0, checksum_kind=kind)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20_000), st.integers(1, 30), st.sampled_from(KINDS))
def test_tensors_are_found_again_whatever_the_buckets(bucket_bytes: int, count: int, kind: int) -> None:
    tensors = random_tensors(count, count)
    stretches, manifest = filled(tensors, bucket_bytes, kind)
    manifests.validate(manifest)
    flats.check_covered(manifest, ((base, flat.numel()) for base, flat in stretches.items()))
    flats.verify(stretches, manifest, "here", THREADS)
    weights = flats.FlatWeights(stretches, manifest.tensors)
    assert weights.tensors.keys() == tensors.keys()
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in tensors.items())


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_a_changed_byte_of_a_tensor_is_noticed(data: st.DataObject) -> None:
    stretches, manifest = filled(random_tensors(3, 6), 2000, data.draw(st.sampled_from(KINDS)))
    victim = data.draw(st.sampled_from([tensor for tensor in manifest.tensors if tensor.nbytes]))
    byte = victim.offset + data.draw(st.integers(0, victim.nbytes - 1))
    base = max(start for start in stretches if start <= byte)
    stretches[base][byte - base] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ChecksumMismatch, match=victim.name):
        flats.verify(stretches, manifest, "here", THREADS)


@pytest.mark.parametrize("kind", KINDS)
def test_served_tensors_are_compared_by_the_kind_of_checksum_that_the_manifest_names(kind: int) -> None:
    tensors = random_tensors(5, 6)
    _, manifest = filled(tensors, 2000, kind)
    check_weight_update_equal(manifest, tensors)
    name = next(tensor.name for tensor in manifest.tensors if tensor.nbytes)
    tensors[name] = tensors[name].clone()
    tensors[name].reshape(-1).view(torch.uint8)[0] ^= 1
    with pytest.raises(ChecksumMismatch, match=name):
        check_weight_update_equal(manifest, tensors)


def test_packed_bytes_are_those_of_the_tensors_alone() -> None:
    tensors = random_tensors(1, 5)
    stretches, manifest = filled(tensors, 1 << 20)
    expected = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    assert flats.packed(stretches[0], list(manifest.tensors)).numpy().tobytes() == expected


def test_buckets_that_overlap_or_leave_the_buffer_are_refused() -> None:
    _, manifest = filled(random_tensors(1), 1 << 20)
    whole = (0, manifest.total_bytes)
    for stretches in ([whole, (64, 1)], [(64, manifest.total_bytes)], []):
        with pytest.raises(ManifestError):
            flats.check_covered(manifest, stretches)


def test_memory_counts_as_free_only_when_nobody_holds_a_tensor() -> None:
    stretches, manifest = filled(random_tensors(1), 4096)
    weights = flats.FlatWeights(stretches, manifest.tensors)
    held = weights.tensors["layer.3"]
    stretches.clear()
    assert not weights.release()
    del held
    assert weights.release()


@pytest.mark.parametrize("shape", [(), (0, 4), (3,), (2, 0, 5), (2, 3, 5), (1, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_a_view_is_contiguous_and_begins_at_its_offset(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    descriptors, total = manifests.plan(
        [("first", wire_dtype(torch.uint8), (3,)), ("second", wire_dtype(dtype), shape)]
    )
    flat = torch.zeros(64 + total + 1, dtype=torch.uint8)[64:]
    tensor = flats.views(flat, descriptors)[1]
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    if tensor.numel():
        tensor.fill_(1)
        begin = descriptors[1].offset
        filled_bytes = flat.nonzero().flatten()
        assert begin <= int(filled_bytes.min())
        assert int(filled_bytes.max()) < begin + descriptors[1].nbytes


def test_a_tensor_beyond_the_flat_bytes_has_no_view() -> None:
    descriptors, total = manifests.plan([("first", wire_dtype(torch.float32), (3,))])
    storage = torch.zeros(total + 64, dtype=torch.uint8)
    with pytest.raises(ManifestError, match="'first' is not in the 11 bytes from byte 0 on"):
        flats.views(storage[:11], descriptors)
    with pytest.raises(ManifestError, match="from byte 64 on"):
        flats.views(storage[:12], descriptors, base=64)
