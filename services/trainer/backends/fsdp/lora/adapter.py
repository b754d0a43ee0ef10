"""The adapter that is trained instead of the full policy: attached as configured, merged or written for export."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles.rpc.gen import policy_pb2
from miles.services.trainer.backends.fsdp.lora.layers import (
    ALL_LINEAR,
    LoraLinear,
    attach_adapters,
    load_adapters,
    named_adapters,
)
from miles.services.trainer.backends.fsdp.model.sharded_model import named_weights
from miles.services.trainer.step import algorithm_options
from miles.weights.adapters import peft_folder
from miles.weights.adapters.lora import adapted_weights, adapter_names, base_checksum, merged, scale_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from miles.config import JobConfig

Weights = Iterable[tuple[str, torch.Tensor]]
_IDENTITY_DTYPE = torch.bfloat16
"""The narrowest type that a base is held in: wider ones round to the same."""


@dataclasses.dataclass(frozen=True, slots=True)
class Adapter:
    """The trained adapter of a policy."""

    described: policy_pb2.LoraAdapter
    """Its description for engines."""
    base: str
    """Folder of the base."""
    identity: str
    """Of the base, in hex; the same for every dtype it is held in, so that a checkpoint can resume in another."""

    def write(self, folder: pathlib.Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write it, in PEFT's form, to a new folder."""
        alpha = self.described.alpha
        adapter = peft_folder.PeftAdapter(self.described.rank, int(alpha) if alpha.is_integer() else alpha, tensors)
        peft_folder.write(folder, adapter, self.base)


def adapt(model: PreTrainedModel, config: JobConfig) -> Adapter:
    """Add the configured adapters to a model that was just loaded and is not sharded yet; collective.

    Raises ValueError for modules that cannot be adapted, or an adapter to start from that does not fit, and
    FileNotFoundError when that one is missing.
    """
    lora, rank_0 = config.lora, dist.get_rank() == 0
    dtype = algorithm_options.DTYPES[config.rollout.rollout_dtype]
    # All weights, as an engine has them; rank 0 alone has their values yet.
    checksums = [_checksums(model, dtype) if rank_0 else {}]
    dist.broadcast_object_list(checksums, src=0)
    described = policy_pb2.LoraAdapter(rank=lora.lora_rank, alpha=lora.lora_alpha, base_checksum=checksums[0][dtype])
    start = None if lora.lora_adapter_path is None else peft_folder.read(pathlib.Path(lora.lora_adapter_path))
    if start is not None and (start.rank, start.alpha) != (lora.lora_rank, lora.lora_alpha):
        raise ValueError(
            f"the adapter in {lora.lora_adapter_path} has rank {start.rank} and alpha {start.alpha:g}; set lora_rank "
            "and lora_alpha to these"
        )
    if lora.target_modules is not None:
        targets = _names(lora.target_modules)
    elif start is not None:
        targets = [weight.removesuffix(".weight") for weight in adapted_weights(start.tensors)]
    else:
        targets = [ALL_LINEAR]
    scale = scale_of(described)
    attach_adapters(
        model, targets, _names(lora.exclude_modules), rank=lora.lora_rank, scale=scale, seed=config.train.seed
    )
    if start is not None:
        load_adapters(model, start.tensors)
    return Adapter(described, str(config.rollout.hf_checkpoint), checksums[0][_IDENTITY_DTYPE].hex())


def _checksums(model: PreTrainedModel, served: torch.dtype) -> dict[torch.dtype, bytes]:
    """Checksums of the base by dtype: as engines hold it, and as checkpoints identify it."""
    types = dict.fromkeys((served, _IDENTITY_DTYPE))
    return {dtype: base_checksum(named_weights(model), dtype) for dtype in types}


def merged_weights(model: torch.nn.Module, gather: Callable[[Weights], Iterator[tuple[str, torch.Tensor]]]) -> Weights:
    """Every weight of the policy by HF name with its adapter merged in, as engines make it; collective.

    `gather` all-gathers sharded tensors, in their order and in the dtype of the export.
    """
    adapters = dict(named_adapters(model))
    scales = {f"{name}.weight": m.scale for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    own = {id(parameter) for parameter in adapters.values()}

    def in_threes() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_weights(model):
            if name in scales:
                yield from ((part, adapters[part]) for part in adapter_names(name))
            if id(tensor) not in own:
                yield name, tensor

    factors: list[torch.Tensor] = []
    for name, tensor in gather(in_threes()):
        if name in adapters:
            factors.append(tensor.clone())  # its bucket is freed before the weight's arrives
        elif name in scales:
            yield name, merged(tensor, factors[0], factors[1], scales[name])
            factors.clear()
        else:
            yield name, tensor


def _names(text: str | None) -> list[str]:
    return [] if text is None else [name.strip() for name in text.split(",")]
