"""Adapters beside frozen linear layers: attached by megatron-bridge, exported by PEFT's names.

Queries, keys and values are one matrix here, and so are gates and ups: each has one A, of which the exported ones are
copies. Layers add scale · B (A x) to what the base computes, where engines merge the matrices.

Dims: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from miles.lora_targets import fused_targets
from miles.rpc.gen import policy_pb2
from miles.weights.adapters import peft_folder
from miles.weights.adapters.lora import adapter_names, base_checksum, merged, scale_of
from miles.weights.naming.conversion import Named

if TYPE_CHECKING:
    from miles.config.sections.lora import LoraConfig
    from miles.services.trainer.backends.megatron.model.build_model import MegatronModel

_PREFIX = "base_model.model."
_IDENTITY_DTYPE = torch.bfloat16
"""The narrowest type that a base is held in: wider ones round to the same."""


def attach(lora: LoraConfig, seed: int, chunks: list[Any]) -> None:
    """Freeze bare chunks and give their linear layers adapters.

    A begins as PEFT's does, uniform within 1 / sqrt(I), alike in every layout, and B is 0. Raises ValueError for layers
    that cannot be adapted.
    """
    from megatron.bridge.peft.lora import LoRA

    targets = fused_targets(lora.target_modules, lora.exclude_modules)
    LoRA(target_modules=targets, dim=lora.lora_rank, alpha=lora.lora_alpha, dropout=0.0)(chunks, training=True)
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for name, parameter in layer.named_parameters():
                if name.endswith(".adapter.linear_in.weight"):
                    _begin(parameter, zlib.crc32(f"{seed} {layer.layer_number} {name}".encode()))
                elif name.endswith(".adapter.linear_out.weight"):
                    torch.nn.init.zeros_(parameter)
        if chunk.pre_process:
            # Recomputed layers have a gradient only if what goes into them has one.
            chunk.embedding.register_forward_hook(_with_gradient)


def _begin(own: torch.nn.Parameter, seed: int) -> None:
    """Fill this rank's part of A [R, I]."""
    from megatron.core import parallel_state

    dim = int(getattr(own, "partition_dim", -1))
    size, rank = 1, 0
    if getattr(own, "tensor_model_parallel", False):
        size, rank = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
    shape = [length * (size if axis == dim else 1) for axis, length in enumerate(own.shape)]
    full_RI = torch.empty(shape)
    torch.nn.init.kaiming_uniform_(full_RI, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        own.copy_(full_RI.chunk(size, dim)[rank] if size > 1 else full_RI)


def _with_gradient(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


@contextlib.contextmanager
def without_adapters(chunks: Sequence[Any]) -> Iterator[None]:
    """Inside the block, bare chunks compute as their base."""
    layers = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "disable_adapter_layers")]
    for layer in layers:
        layer.disable_adapter_layers()
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapter_layers()


@dataclasses.dataclass(frozen=True, slots=True)
class Adapter:
    """The trained adapter of a policy."""

    model: MegatronModel
    described: policy_pb2.LoraAdapter
    """Its description for engines."""
    identity: str
    """Of the base, in hex, the same for every dtype that it is held in."""
    dtype: torch.dtype
    """In which it is exported."""

    def tensors(self, *, exact: bool = False) -> Iterator[Named]:
        """A and B of every adapted matrix by PEFT's names, on every rank; collective.

        `exact` gives them in the type of the training.
        """
        model = self.model
        for name, tensor in model.bridge.export_adapter_weights(model.chunks, cpu=False, show_progress=False):
            full = tensor.detach().contiguous()
            yield _PREFIX + name.removeprefix(_PREFIX), full if exact else full.to(self.dtype)

    def merged(self, base: Iterable[Named]) -> Iterator[Named]:
        """The weights of the base with the adapter merged in, as engines make them; collective."""
        own = dict(self.tensors())
        for name, weight in base:
            a_name, b_name = adapter_names(name)
            if a_name in own:
                yield name, merged(weight, own[a_name], own[b_name], scale_of(self.described))
            else:
                yield name, weight

    def write(self, folder: pathlib.Path, base: str) -> None:
        """Write it, in PEFT's form, to a new folder; collective."""
        own = {name: tensor.float().clone() for name, tensor in self.tensors(exact=True)}  # some share their memory
        if dist.get_rank() == 0:
            described = peft_folder.PeftAdapter(self.described.rank, self.described.alpha, own)
            peft_folder.write(folder, described, base)


def describe(model: MegatronModel, lora: LoraConfig, base: Any, dtype: torch.dtype) -> Adapter:
    """The adapter of a model to which `attach` was applied; `base` gives the weights it adapts; collective."""

    def checksum(kind: torch.dtype) -> bytes:
        found = [b""]
        if dist.get_rank() == 0:
            found[0] = base_checksum(base(), kind)
        else:
            for _ in base():
                pass
        dist.broadcast_object_list(found, src=0)
        return found[0]

    served = checksum(dtype)
    described = policy_pb2.LoraAdapter(rank=lora.lora_rank, alpha=lora.lora_alpha, base_checksum=served)
    identity = served if dtype is _IDENTITY_DTYPE else checksum(_IDENTITY_DTYPE)
    return Adapter(model, described, identity.hex(), dtype)
