"""`check_weight_update_equal`: does an engine serve, bit for bit, what the trainer sent?"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from miles.rpc.gen import policy_pb2
from miles.weights import manifest as manifests
from miles.weights.block_sums import block_checksum
from miles.weights.dtypes import TORCH_DTYPE
from miles.weights.manifest import ChecksumMismatch


def check_weight_update_equal(manifest: policy_pb2.Manifest, served: Mapping[str, torch.Tensor]) -> None:
    """Raise ChecksumMismatch unless `served`, by HF name, contains exactly the manifest's tensors.

    A served name that the manifest lacks must share its memory with one that the manifest has (tied weights);
    otherwise it is a parameter that no update reaches.
    """
    faults: list[str] = []
    covered: set[int] = set()
    for descriptor in manifest.tensors:
        tensor = served.get(descriptor.name)
        if tensor is None:
            faults.append(f"{descriptor.name} is not served")
            continue
        covered.add(tensor.data_ptr())
        fault = _difference(descriptor, tensor, manifest.checksum_kind)
        if fault:
            faults.append(f"{descriptor.name} {fault}")
    sent = {descriptor.name for descriptor in manifest.tensors}
    faults += [
        f"{name} was not sent"
        for name, tensor in served.items()
        if name not in sent and tensor.data_ptr() not in covered
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ChecksumMismatch(
            f"the engine does not hold {manifests.describe(manifest.version)}: {'; '.join(faults[:3])}{more}"
        )


def _difference(descriptor: policy_pb2.TensorDescriptor, tensor: torch.Tensor, kind: int) -> str:
    """How a served tensor differs from its descriptor; empty when it does not."""
    expected = TORCH_DTYPE[descriptor.dtype]
    if tensor.dtype != expected or tuple(tensor.shape) != tuple(descriptor.shape):
        return f"is {tensor.dtype} {tuple(tensor.shape)} instead of {expected} {tuple(descriptor.shape)}"
    if kind == policy_pb2.CHECKSUM_KIND_BLOCK_SUMS:
        found = block_checksum(tensor, descriptor.offset)
    else:
        found = manifests.checksum(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return "" if found == descriptor.checksum else "has other bytes"
