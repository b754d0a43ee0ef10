"""A Hugging Face model, under FSDP2 where it is sharded: loading and placing it, and its weights by name."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from miles.precision.emulation.experts import GROUPED, PADDED
from miles.precision.emulation.model import emulate
from miles.precision.recipe import Recipe
from miles.services.trainer.backends.fsdp.attention import packed_attention as attention
from miles.services.trainer.backends.fsdp.model.working_weights import WorkingWeights
from miles.services.trainer.checkpoint.errors import reading_model
from miles.services.trainer.step.value_head import ValueHead, initial_weight
from miles.weights.hf_folder.model_config import read_model_config
from miles.weights.hf_folder.pretrained import read_model
from miles.weights.naming.model_tensors import once

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, slots=True)
class Precision:
    """Types of the parameters as held and as computed with; gradients are reduced in float32."""

    master: torch.dtype
    compute: torch.dtype


def load_hf_model(folder: str | pathlib.Path, dtype: torch.dtype, *, gradient_checkpointing: bool) -> PreTrainedModel:
    """A causal language model of a Hugging Face folder, in `dtype`, with packed attention.

    Rank 0 reads its weights onto the CPU; the other ranks get a model without weights, which `place` fills.
    Raises FileNotFoundError when the folder is not there or is not a checkpoint, and ValueError for one that cannot be
    read.
    """
    from transformers import AutoModelForCausalLM

    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {folder}: there is no config.json; set hf_checkpoint (or ref_load) to a Hugging Face folder"
        )
    attention.register()
    model: PreTrainedModel
    if dist.get_rank() == 0:
        with reading_model(folder):
            model = read_model(folder, dtype, attn_implementation=attention.PACKED_ATTENTION)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                read_model_config(folder), dtype=dtype, attn_implementation=attention.PACKED_ATTENTION
            )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # old and new log-probabilities must come from the same function
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    model.train()
    return model


def put_value_head(model: PreTrainedModel, folder: str | pathlib.Path) -> None:
    """Replace the vocabulary head with a value head, so that the model's logits are values.

    On rank 0 its weights are those of the folder, if it has any.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hidden_size: int = head.weight.shape[1]
    weight_1H = initial_weight(folder, hidden_size).to(head.weight.dtype)
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(ValueHead(weight_1H.to(head.weight.device)))  # type: ignore[no-untyped-call]


def place(
    model: PreTrainedModel,
    precision: Precision,
    device: torch.device,
    *,
    cpu_offload: bool,
    recipe: Recipe | None = None,
) -> WorkingWeights:
    """Move the model to the device, or its shards to the ranks' devices, and have it compute by `recipe`.

    One rank holds plain parameters, unless they are to stay in host memory. Several shard them over the default process
    group, a unit per decoder layer plus one for the rest: embeddings and head stay together, so that tied weights are
    sharded once. Plain ones are rounded once for all micro-batches, shards in every pass, after they are gathered.
    Raises NotEmulated.
    """
    alone = dist.get_world_size() == 1 and not cpu_offload
    if recipe is not None:
        emulate(model, recipe, weights=not alone)
        model.set_experts_implementation(PADDED if device.type == "cpu" else GROUPED)
    if alone:
        torch.nn.Module.to(model, device)
        return WorkingWeights.of(model, precision.compute, recipe)
    _shard(model, precision, device, cpu_offload=cpu_offload)
    return WorkingWeights.none(precision.compute)


def _shard(model: PreTrainedModel, precision: Precision, device: torch.device, *, cpu_offload: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    home = torch.device("cpu") if cpu_offload else device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    alone = mesh.size() == 1
    weights: dict[str, Any] = {} if alone or dist.get_rank() else model.state_dict()
    buffers = dict(model.named_buffers())
    torch.nn.Module.to(model, home if alone else "meta")
    if not alone:
        model.tie_weights()  # moving to meta has made tied parameters two
    policy = MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=not alone)
    sharded = fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    if not alone:
        _fill(sharded, weights, buffers, home)


def _fill(model: FSDPModule, weights: dict[str, Any], buffers: dict[str, torch.Tensor], home: torch.device) -> None:
    """Give every rank its shards of rank 0's weights, tensor by tensor, and a copy of its buffers; collective."""
    assert isinstance(model, torch.nn.Module)
    model.to_empty(device=home)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=options)
    for name, buffer in model.named_buffers():
        if dist.get_rank() == 0:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model's repeated blocks, sharded or not, found by the class names that transformers gives for them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if not names.isdisjoint(_class_names(module))]


def _class_names(module: torch.nn.Module) -> list[str]:
    """FSDP makes a sharded module's class one of its own, below the model's."""
    return [kind.__name__ for kind in type(module).__mro__]


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights by name in the module form: parameters and persistent buffers, tied ones once."""
    yield from once(model.state_dict(keep_vars=True)).items()


def free_gathered(model: torch.nn.Module) -> None:
    """Free the parameters that FSDP has gathered and keeps for the next pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on every rank; collective for a sharded one."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached
