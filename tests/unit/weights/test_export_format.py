"""A form of the weights other than the trainer's: what is announced, sent, verified and served."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import pytest
import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.check import check_weight_update_equal
from miles.weights.dtypes import wire_dtype
from miles.weights.export_format import AS_TRAINED, Entry, ExportFormat, formatted, formatted_layout
from miles.weights.manifest import ChecksumMismatch
from miles.weights.transports.shared_memory.transport import SharedMemoryTransport


class RowsAsInt8:
    """Matrices as 8-bit rows and a scale for each row; everything else as it is."""

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Entry]:
        if len(shape) != 2:
            return ((name, dtype, shape),)
        return ((name, torch.int8, shape), (f"{name}_scale", torch.float32, (shape[0], 1)))

    def convert(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        if tensor.dim() != 2:
            yield name, tensor
            return
        scale = tensor.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        yield name, (tensor / scale).round().to(torch.int8)
        yield f"{name}_scale", scale


def publish(
    folder: pathlib.Path, tensors: dict[str, torch.Tensor], export_format: ExportFormat
) -> tuple[weightsync_pb2.TransportHandle, policy_pb2.Manifest]:
    layout = formatted_layout(export_format, [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()])
    descriptors, total = manifests.plan((name, wire_dtype(dtype), shape) for name, dtype, shape in layout)
    path = folder / "version"
    path.write_bytes(bytes(total))
    handle = weightsync_pb2.TransportHandle(
        kind=weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY,
        shared_memory=weightsync_pb2.SharedMemoryHandle(path=str(path), nbytes=total),
    )
    SharedMemoryTransport().send(handle, descriptors, formatted(export_format, tensors.items()))
    version = policy_pb2.WeightVersion(job_id="job", stream=policy_pb2.WEIGHT_STREAM_POLICY)
    return handle, manifests.build(version, descriptors, total, 0)


def test_tensors_of_another_form_are_sent_and_verified_as_what_they_become(tmp_path: pathlib.Path) -> None:
    trained = {"norm": torch.randn(8), "weight": torch.randn(8, 16).bfloat16()}
    handle, manifest = publish(tmp_path, trained, RowsAsInt8())
    served = SharedMemoryTransport().receive(handle, manifest).tensors
    assert list(served) == ["norm", "weight", "weight_scale"]
    assert served["weight"].dtype == torch.int8
    torch.testing.assert_close(
        served["weight"] * served["weight_scale"], trained["weight"].float(), atol=0.02, rtol=0.02
    )
    check_weight_update_equal(manifest, served)
    with pytest.raises(ChecksumMismatch, match=r"weight is torch\.bfloat16"):
        check_weight_update_equal(manifest, {**served, "weight": trained["weight"]})


def test_the_usual_form_changes_nothing(tmp_path: pathlib.Path) -> None:
    trained = {"norm": torch.randn(8), "weight": torch.randn(8, 16)}
    handle, manifest = publish(tmp_path, trained, AS_TRAINED)
    check_weight_update_equal(manifest, trained)
    assert all(SharedMemoryTransport().receive(handle, manifest).tensors[n].equal(t) for n, t in trained.items())
