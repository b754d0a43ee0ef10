"""Manifests: layout, self-consistency, and that no change to one goes unnoticed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.rpc.gen import policy_pb2, sample_pb2
from miles.weights import manifest as manifests
from miles.weights.manifest import ALIGNMENT, DTYPE_BYTES, ChecksumMismatch, ManifestError

VERSION = policy_pb2.WeightVersion(job_id="job", stream=policy_pb2.WEIGHT_STREAM_POLICY, version=3)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
LAYOUTS = st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), SHAPES), max_size=8)


def build(layout: list[tuple[int, tuple[int, ...]]]) -> policy_pb2.Manifest:
    """A manifest of tensors t0, t1, ... whose bytes are all zero."""
    descriptors, total = manifests.plan((f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(layout))
    for descriptor in descriptors:
        descriptor.checksum = manifests.checksum(bytes(descriptor.nbytes))
    return manifests.build(VERSION, descriptors, total, train_step=7)


@given(LAYOUTS)
def test_tensors_are_aligned_disjoint_and_inside_the_buffer(layout: list[tuple[int, tuple[int, ...]]]) -> None:
    manifest = build(layout)
    manifests.validate(manifest)
    end = 0
    for tensor, (dtype, shape) in zip(manifest.tensors, layout, strict=True):
        assert tensor.offset % ALIGNMENT == 0
        assert tensor.offset >= end
        assert tensor.nbytes == math.prod(shape) * DTYPE_BYTES[dtype]
        end = tensor.offset + tensor.nbytes
    assert end <= manifest.total_bytes
    assert manifest.total_bytes >= 1


def test_every_dtype_of_the_wire_has_a_size() -> None:
    assert set(DTYPE_BYTES) == set(sample_pb2.DType.values()) - {sample_pb2.DTYPE_UNSPECIFIED}


CHANGES: dict[str, Callable[[policy_pb2.Manifest], None]] = {
    "a name": lambda m: setattr(m.tensors[1], "name", "other"),
    "an empty name": lambda m: setattr(m.tensors[1], "name", ""),
    "a repeated name": lambda m: setattr(m.tensors[1], "name", m.tensors[0].name),
    "a dtype of the same size": lambda m: setattr(m.tensors[0], "dtype", sample_pb2.DTYPE_INT32),
    "an unknown dtype": lambda m: setattr(m.tensors[0], "dtype", 99),
    "a shape": lambda m: m.tensors[0].shape.append(2),
    "a shape of as many elements": lambda m: m.tensors[0].shape.append(1),
    "a length": lambda m: setattr(m.tensors[0], "nbytes", 8),
    "an offset": lambda m: setattr(m.tensors[1], "offset", m.tensors[1].offset + ALIGNMENT),
    "an offset off the grid": lambda m: setattr(m.tensors[1], "offset", m.tensors[1].offset + 4),
    "an overlap": lambda m: setattr(m.tensors[1], "offset", 0),
    "a checksum": lambda m: setattr(m.tensors[0], "checksum", bytes(16)),
    "a short checksum": lambda m: setattr(m.tensors[0], "checksum", b"1"),
    "the total": lambda m: setattr(m, "total_bytes", 4),
    "the order": lambda m: m.tensors.sort(key=lambda t: -t.offset),
    "one tensor fewer": lambda m: m.tensors.pop(),
    "its own checksum": lambda m: setattr(m, "checksum", bytes(16)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_manifest_is_refused(name: str) -> None:
    manifest = build([(sample_pb2.DTYPE_FLOAT32, (4, 5)), (sample_pb2.DTYPE_BFLOAT16, (3,))])
    CHANGES[name](manifest)
    with pytest.raises(ManifestError):
        manifests.validate(manifest)


def test_a_repeated_name_in_a_layout_is_refused() -> None:
    with pytest.raises(ManifestError, match="'w' occurs twice"):
        manifests.plan([("w", sample_pb2.DTYPE_UINT8, (1,)), ("w", sample_pb2.DTYPE_UINT8, (1,))])


def test_names_that_run_together_have_different_checksums() -> None:
    one, other = policy_pb2.Manifest(), policy_pb2.Manifest()
    for name in ("ab", "c"):
        one.tensors.add(name=name)
    for name in ("a", "bc"):
        other.tensors.add(name=name)
    assert manifests.manifest_checksum(one) != manifests.manifest_checksum(other)


def test_the_checksum_of_a_manifest_is_of_its_canonical_form() -> None:
    """Pinned: trainers and engines of different releases must agree on it."""
    manifest = build([(sample_pb2.DTYPE_FLOAT32, (2,))])
    assert manifest.tensors[0].checksum.hex() == "2c0a8a99dc147d5445c3b49d035665b2"
    assert manifest.checksum.hex() == "f1386c9323f533ec9f0c8931b580c714"


def test_a_mismatch_is_a_manifest_error_and_a_value_error() -> None:
    assert issubclass(ChecksumMismatch, ManifestError)
    assert issubclass(ManifestError, ValueError)
