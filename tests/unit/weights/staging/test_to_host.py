"""Tensors through staging buffers into host memory, with tensors of a CPU in place of a GPU's."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rpc.gen import policy_pb2
from miles.weights import manifest as manifests
from miles.weights.dtypes import TORCH_DTYPE, wire_dtype
from miles.weights.staging.ring import StagingRing
from miles.weights.staging.to_host import ToHost

SLOT_BYTES = 128
Buffer = np.ndarray[tuple[int], np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def threads() -> Iterator[concurrent.futures.Executor]:
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        yield executor


def new_ring(slots: int = 2) -> StagingRing:
    return StagingRing(pin_memory=False, slot_bytes=SLOT_BYTES, slots=slots)


def random_bytes(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def planned(
    tensors: list[torch.Tensor],
) -> tuple[list[policy_pb2.TensorDescriptor], Buffer]:
    """Descriptors of a version of these tensors, and a buffer for it."""
    descriptors, total = manifests.plan(
        (f"t{i}", wire_dtype(tensor.dtype), tuple(tensor.shape)) for i, tensor in enumerate(tensors)
    )
    return descriptors, np.full(total, 255, np.uint8)


def fill(
    ring: StagingRing,
    threads: concurrent.futures.Executor,
    descriptors: list[policy_pb2.TensorDescriptor],
    tensors: list[torch.Tensor],
    buffer: Buffer,
    *,
    failing_after: int | None = None,
) -> None:
    """Copy tensors into a version's buffer; the export breaks off after so many."""
    with ToHost(ring, threads) as copies:
        for number, (descriptor, tensor) in enumerate(zip(descriptors, tensors, strict=True)):
            if number == failing_after:
                raise RuntimeError("the export broke off")
            copies.add(descriptor, tensor, buffer[descriptor.offset : descriptor.offset + descriptor.nbytes])


def copy(
    ring: StagingRing, threads: concurrent.futures.Executor, tensors: list[torch.Tensor], wanted: list[torch.Tensor]
) -> None:
    """Copy tensors into a version that is to hold `wanted`, and compare it."""
    descriptors, buffer = planned(wanted)
    fill(ring, threads, descriptors, tensors, buffer)
    for descriptor, expected in zip(descriptors, wanted, strict=True):
        data = expected.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert np.array_equal(buffer[descriptor.offset : descriptor.offset + descriptor.nbytes], data), descriptor.name
        assert descriptor.checksum == manifests.checksum(data.data)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(TORCH_DTYPE.values())), st.integers(0, 3 * SLOT_BYTES)), max_size=12),
    st.integers(1, 4),
)
def test_every_byte_arrives_whatever_fits_into_a_slot(
    threads: concurrent.futures.Executor, sizes: list[tuple[torch.dtype, int]], slots: int
) -> None:
    tensors = [random_bytes(size - size % dtype.itemsize, i) for i, (dtype, size) in enumerate(sizes)]
    tensors = [
        (tensor & 1 if dtype == torch.bool else tensor).view(dtype)
        for tensor, (dtype, _) in zip(tensors, sizes, strict=True)
    ]
    ring = new_ring(slots)
    for _ in range(2):
        copy(ring, threads, tensors, tensors)


def test_tensors_are_converted_and_their_strides_do_not_matter(threads: concurrent.futures.Executor) -> None:
    masters = [
        torch.randn(11, 17),
        torch.randn(17, 11).t(),
        torch.randn(40, 3)[::2],
        torch.tensor(0.1),
        torch.empty(0, 3),
    ]
    copy(new_ring(), threads, masters, [master.bfloat16() for master in masters])


def test_an_export_that_fails_gives_every_slot_back(threads: concurrent.futures.Executor) -> None:
    ring, tensors = new_ring(), [torch.randn(20), torch.randn(100), torch.randn(1)]
    for failing_after in range(3):
        descriptors, buffer = planned(tensors)
        with pytest.raises(RuntimeError, match="the export broke off"):
            fill(ring, threads, descriptors, tensors, buffer, failing_after=failing_after)
    copy(ring, threads, tensors, tensors)


def test_a_place_that_cannot_be_written_fails_the_copy_and_gives_every_slot_back(
    threads: concurrent.futures.Executor,
) -> None:
    ring, tensors = new_ring(), [torch.randn(100), torch.randn(3)]
    descriptors, buffer = planned(tensors)
    buffer.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        fill(ring, threads, descriptors, tensors, buffer)
    copy(ring, threads, tensors, tensors)


def test_the_end_waits_for_threads_that_still_copy() -> None:
    held = threading.Event()
    tensor = torch.arange(16)
    descriptors, buffer = planned([tensor])
    with concurrent.futures.ThreadPoolExecutor(1) as one:
        one.submit(held.wait)
        opened = threading.Timer(0.05, held.set)
        with ToHost(new_ring(), one) as copies:
            copies.add(descriptors[0], tensor, buffer)
            opened.start()
            assert buffer.tolist() == [255] * tensor.nbytes
    assert buffer.view(np.int64).tolist() == tensor.tolist()
    assert descriptors[0].checksum


def test_a_checksum_that_is_known_stays(threads: concurrent.futures.Executor) -> None:
    descriptors, buffer = planned([torch.arange(100)])
    descriptors[0].checksum = b"another's"
    with ToHost(new_ring(), threads) as copies:
        copies.add(descriptors[0], torch.arange(100), buffer)
    assert descriptors[0].checksum == b"another's"
