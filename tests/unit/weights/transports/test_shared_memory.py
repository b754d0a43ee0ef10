"""The shared-memory transport: both ends over one file."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.check import check_weight_update_equal
from miles.weights.dtypes import TORCH_DTYPE, wire_dtype
from miles.weights.manifest import ChecksumMismatch, ManifestError
from miles.weights.registry import create_transport
from miles.weights.staging.ring import StagingRing
from miles.weights.transports.shared_memory.transport import SharedMemoryTransport

VERSION = policy_pb2.WeightVersion(job_id="job", stream=policy_pb2.WEIGHT_STREAM_POLICY, version=3)


def handle_of(path: pathlib.Path, nbytes: int) -> weightsync_pb2.TransportHandle:
    """A file of that size."""
    with path.open("wb") as file:
        file.truncate(nbytes)
    return weightsync_pb2.TransportHandle(
        kind=weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY,
        shared_memory=weightsync_pb2.SharedMemoryHandle(path=str(path), nbytes=nbytes),
    )


def send(
    path: pathlib.Path,
    tensors: dict[str, torch.Tensor],
    layout: dict[str, torch.Tensor] | None = None,
    transport: SharedMemoryTransport | None = None,
) -> tuple[weightsync_pb2.TransportHandle, policy_pb2.Manifest]:
    """Write tensors the way the publisher does; `layout` announces other ones."""
    announced = layout or tensors
    descriptors, total = manifests.plan((n, wire_dtype(t.dtype), tuple(t.shape)) for n, t in announced.items())
    handle = handle_of(path, total)
    (transport or SharedMemoryTransport()).send(handle, descriptors, tensors.items())
    return handle, manifests.build(VERSION, descriptors, total, 0)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bytes at all, NaNs included, but for booleans, which have two values."""
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (data & 1 if dtype == torch.bool else data).view(dtype).view(shape)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(list(TORCH_DTYPE.values())), st.lists(st.integers(0, 7), max_size=3)), max_size=6
    )
)
def test_what_is_received_is_what_was_sent(tmp_path: pathlib.Path, shapes: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = {f"t{i}": random_tensor(dtype, tuple(shape), i) for i, (dtype, shape) in enumerate(shapes)}
    handle, manifest = send(tmp_path / "file", tensors)
    received = SharedMemoryTransport().receive(handle, manifest)
    assert list(received.tensors) == list(tensors)
    for name, tensor in tensors.items():
        got = received.tensors[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert got.is_contiguous()
        assert got.view(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    check_weight_update_equal(manifest, received.tensors)


def test_dtypes_are_converted_and_strides_do_not_matter_on_the_way(tmp_path: pathlib.Path) -> None:
    master = torch.randn(5, 3)
    wanted = master.t().bfloat16()
    handle, manifest = send(tmp_path / "file", {"w": torch.nn.Parameter(master).t()}, {"w": wanted.contiguous()})
    assert SharedMemoryTransport().receive(handle, manifest).tensors["w"].equal(wanted)


def test_tensors_that_go_through_staging_buffers_are_the_same_version_after_version(tmp_path: pathlib.Path) -> None:
    ring = StagingRing(pin_memory=False, slot_bytes=256, slots=2)
    transport = SharedMemoryTransport(ring, staged=("cpu",))
    wanted = {"big": torch.empty(50, 7), "empty": torch.empty(0, 2), "small": torch.empty(3), "t": torch.empty(7, 5)}
    announced = {name: tensor.bfloat16() for name, tensor in wanted.items()}
    for _ in range(3):
        masters = {name: torch.randn_like(tensor) for name, tensor in wanted.items()}
        masters["t"] = torch.randn(5, 7).t()
        with pytest.raises(ManifestError, match="ended before tensor 't'"):
            send(tmp_path / "broken", dict(list(masters.items())[:3]), announced, transport)
        handle, manifest = send(tmp_path / "file", masters, announced, transport)
        received = SharedMemoryTransport().receive(handle, manifest).tensors
        assert {name: tensor.tolist() for name, tensor in received.items()} == {
            name: tensor.bfloat16().tolist() for name, tensor in masters.items()
        }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": torch.ones(2)}, "ended before tensor 'b'"),
        ({"w": torch.ones(2), "x": torch.ones(3)}, "yields 'x'"),
        ({"w": torch.ones(2), "b": torch.ones(4)}, r"\(4,\) where its layout has 'b' \(3,\)"),
        ({"w": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "'c' after the last"),
    ],
)
def test_an_export_that_departs_from_its_layout_is_refused(
    tmp_path: pathlib.Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        send(tmp_path / "file", tensors, {"w": torch.ones(2), "b": torch.ones(3)})


def test_any_flipped_bit_is_found_and_named(tmp_path: pathlib.Path) -> None:
    handle, manifest = send(tmp_path / "file", {"a": torch.ones(100), "b": torch.ones(1)})
    content = bytearray((tmp_path / "file").read_bytes())
    content[manifest.tensors[1].offset] ^= 1
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ChecksumMismatch, match=r"1 of 2 tensors of policy version 3 of job job.*: b$"):
        SharedMemoryTransport().receive(handle, manifest)


def test_a_file_that_is_too_short_is_refused(tmp_path: pathlib.Path) -> None:
    handle, manifest = send(tmp_path / "file", {"a": torch.ones(100)})
    os.truncate(tmp_path / "file", 100)
    with pytest.raises(ManifestError, match="has 100 bytes; the manifest needs 400"):
        SharedMemoryTransport().receive(handle, manifest)
    with pytest.raises(OSError, match="400 were allocated"):
        SharedMemoryTransport().send(handle, manifest.tensors, [("a", torch.ones(100))])


def test_a_receiver_that_writes_harms_nobody(tmp_path: pathlib.Path) -> None:
    handle, manifest = send(tmp_path / "file", {"a": torch.ones(100)})
    first, second = (SharedMemoryTransport().receive(handle, manifest) for _ in range(2))
    first.tensors["a"].zero_()
    assert second.tensors["a"].sum() == 100
    SharedMemoryTransport().receive(handle, manifest)


def test_received_bytes_outlive_their_file_until_the_last_tensor_goes(tmp_path: pathlib.Path) -> None:
    handle, manifest = send(tmp_path / "file", {"a": torch.ones(100), "b": torch.zeros(3)})
    received = SharedMemoryTransport().receive(handle, manifest)
    kept = received.tensors["a"]
    (tmp_path / "file").unlink()
    assert not received.release()
    assert kept.sum() == 100
    del kept
    assert received.release()


def test_a_renamed_file_is_written_through_the_mapping_made_before(tmp_path: pathlib.Path) -> None:
    transport = SharedMemoryTransport()
    for number in range(3):
        handle, manifest = send(tmp_path / "one", {"a": torch.full((100,), number)}, transport=transport)
        (tmp_path / "one").rename(tmp_path / "two")
        handle.shared_memory.path = str(tmp_path / "two")
        assert SharedMemoryTransport().receive(handle, manifest).tensors["a"].sum() == 100 * number
        (tmp_path / "two").rename(tmp_path / "one")
    maps = pathlib.Path("/proc/self/maps").read_text()
    assert sum(str(tmp_path) in line for line in maps.splitlines()) == 1


def test_a_removed_file_is_unmapped_by_its_writer(tmp_path: pathlib.Path) -> None:
    transport = SharedMemoryTransport()
    send(tmp_path / "file", {"a": torch.ones(100)}, transport=transport)
    (tmp_path / "file").unlink()
    transport.trim()
    assert str(tmp_path) not in pathlib.Path("/proc/self/maps").read_text()


def test_only_transports_that_exist_can_be_made() -> None:
    assert isinstance(create_transport(weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY), SharedMemoryTransport)
    with pytest.raises(ValueError, match="no weight transport of kind 0"):
        create_transport(weightsync_pb2.TRANSPORT_KIND_UNSPECIFIED)


def test_a_dtype_that_the_wire_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="complex64"):
        wire_dtype(torch.complex64)


@pytest.mark.parametrize(
    ("served", "message"),
    [
        ({"a": torch.ones(2)}, "b is not served"),
        ({"a": torch.ones(2), "b": torch.ones(4).int()}, "b is torch.int32"),
        ({"a": torch.ones(2), "b": torch.ones(2, 2)}, r"b is torch.float32 \(2, 2\) instead of torch.float32 \(4,\)"),
        ({"a": torch.ones(2), "b": torch.tensor([1.0, 1, 1, 2])}, "b has other bytes"),
        ({"a": torch.ones(2), "b": torch.ones(4), "c": torch.ones(1)}, "c was not sent"),
    ],
)
def test_an_engine_that_holds_something_else_is_told_what(
    tmp_path: pathlib.Path, served: dict[str, torch.Tensor], message: str
) -> None:
    _, manifest = send(tmp_path / "file", {"a": torch.ones(2), "b": torch.ones(4)})
    with pytest.raises(ChecksumMismatch, match=message):
        check_weight_update_equal(manifest, served)


def test_a_tied_alias_that_was_not_sent_is_fine(tmp_path: pathlib.Path) -> None:
    tensor = torch.ones(4)
    _, manifest = send(tmp_path / "file", {"embed": tensor})
    check_weight_update_equal(manifest, {"embed": tensor, "lm_head": tensor})
