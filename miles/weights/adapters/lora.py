"""LoRA (Hu et al. 2021) as trainer and engines compute it: with merged weights, W + (alpha / rank) * B * A.

Both use `merged` on W, A and B of the same dtype, so that their log-probabilities come from the same weights.
Dims: O outputs, I inputs and R rank of a linear layer.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from miles.weights import manifest as manifests
from miles.weights.base import WeightsRefused
from miles.weights.dtypes import wire_dtype
from miles.weights.manifest import ManifestError, checksum_threads

if TYPE_CHECKING:
    from miles.rpc.gen import policy_pb2

_PREFIX = "base_model.model."
_WEIGHT, _A, _B = ".weight", ".lora_A.weight", ".lora_B.weight"
_RANKS_AT_ONCE, _TILE = 64, 16
"""Limits that keep results independent of the number of threads: some matrix libraries change the order of longer sums,
and of rows and columns beyond multiples of the tile."""


def merged(weight_OI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale * B * A, computed in float32 and rounded once to the dtype of W; a new tensor (O, I)."""
    outputs, inputs = weight_OI.shape
    rows, columns = -outputs % _TILE, -inputs % _TILE
    sum_OI = _padded(weight_OI, rows, columns)
    factors = (torch.split(a_RI, _RANKS_AT_ONCE), torch.split(b_OR, _RANKS_AT_ONCE, 1))
    for a_PI, b_OP in zip(*factors, strict=True):
        sum_OI = torch.addmm(sum_OI, _padded(b_OP, rows, 0), _padded(a_PI, 0, columns), alpha=scale)
    return sum_OI[:outputs, :inputs].to(weight_OI.dtype).contiguous()


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The matrix in float32, with this many rows and columns of zeros added."""
    return torch.nn.functional.pad(matrix.float(), (0, columns, 0, rows)) if rows or columns else matrix.float()


def adapter_names(weight: str) -> tuple[str, str]:
    """PEFT's names of A and B for the weight of a linear layer, by its HF name."""
    layer = _PREFIX + weight.removesuffix(_WEIGHT)
    return layer + _A, layer + _B


def adapted_weights(names: Iterable[str]) -> list[str]:
    """HF names of the weights that an adapter with these tensors adapts, in order of their A.

    Raises ManifestError for tensors that are no A or B, or that lack their counterpart.
    """
    names = list(names)
    weights = [name.removeprefix(_PREFIX).removesuffix(_A) + _WEIGHT for name in names if name.endswith(_A)]
    expected = {name for weight in weights for name in adapter_names(weight)}
    odd = sorted(expected ^ set(names))
    if odd:
        raise ManifestError(f"an adapter has an A and a B for each weight; these do not pair up: {', '.join(odd[:3])}")
    return weights


def base_checksum(tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> bytes:
    """Identity of a model's weights, floating-point ones converted to `dtype`; independent of their order; 16 bytes.

    xxh3-128 over every tensor by ascending name: its name in UTF-8 and a zero byte, dtype and shape in decimal, each
    followed by a space, and the xxh3-128 of its bytes.
    """

    def identify(item: tuple[str, torch.Tensor]) -> tuple[str, bytes]:
        name, tensor = item
        tensor = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).cpu().contiguous()
        kind = "".join(f"{number} " for number in (wire_dtype(tensor.dtype), *tensor.shape))
        content = manifests.checksum(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return name, name.encode() + b"\0" + kind.encode() + content

    digest = manifests.Checksum()
    with concurrent.futures.ThreadPoolExecutor(checksum_threads()) as threads:
        for _, identity in sorted(threads.map(identify, tensors)):
            digest.update(identity)
    return bytes(digest.digest())


def check_fits(adapter: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], rank: int) -> None:
    """Raise WeightsRefused, naming every fault, unless each A and B fits the weight that it adapts."""
    faults = []
    for weight in adapted_weights(adapter):
        if weight not in base:
            faults.append(f"{weight} is no weight of the base")
            continue
        outputs, inputs = base[weight].shape
        for name, shape in zip(adapter_names(weight), ((rank, inputs), (outputs, rank)), strict=True):
            if tuple(adapter[name].shape) != shape:
                faults.append(f"{name} has shape {tuple(adapter[name].shape)} instead of {shape}")
            if adapter[name].dtype != base[weight].dtype:
                faults.append(f"{name} is {adapter[name].dtype}, but its base is {base[weight].dtype}")
    if faults:
        raise WeightsRefused(f"the adapter does not fit its base: {'; '.join(faults)}")


def scale_of(lora: policy_pb2.LoraAdapter) -> float:
    """What the product B * A is multiplied by."""
    return lora.alpha / lora.rank
