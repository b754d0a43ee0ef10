"""The trainer's ranks with FSDP: weights, gradients, optimizer and gathered units."""

from __future__ import annotations

import dataclasses

from miles.memory.amount import Part, When, number
from miles.memory.held import covered_parameters
from miles.memory.model import ModelShape
from miles.memory.parameters import Parameters, layer_parameters, outer_parameters
from miles.memory.run import Model, Run
from miles.memory.tensors import model_tensors

_ADAPTER_BYTES = 4


def fsdp_parts(run: Run) -> tuple[list[Part], list[Part]]:
    """Return what a rank takes on its device, and in host memory besides. Every rank has an equal shard."""
    device: list[Part] = []
    host: list[Part] = []
    home = host if run.settings.fsdp_cpu_offload else device
    if run.settings.lora_rank:
        home += _adapted(run)
    else:
        home += _trained("policy", run, run.policy.parameters.total)
    if run.has_critic:
        home += _trained("critic", run, critic_parameters(run.policy).total)
    frozen = [("reference", run.policy)] if run.has_reference else []
    several = len(run.teachers) > 1  # then they are gathered from host memory, layer by layer
    frozen += [] if several else [("teacher", model) for model in run.teachers]
    for name, model in frozen:
        home.append(_shard(name, run, model.parameters.total, run.train_bytes, f"{run.train_bytes} weights"))
    if several:
        count = sum(model.parameters.total for model in run.teachers)
        host.append(_shard("teachers", run, count, run.train_bytes, f"{run.train_bytes} weights"))
    device += _gathered(run)
    host += _copies(run)
    return device, host


def critic_parameters(model: Model) -> Parameters:
    """Return a critic's parameters: the policy's, with a value head instead of the vocabulary's."""
    return dataclasses.replace(model.parameters, head=0)


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Return the elements of LoRA factors of every linear layer but the head: rank × (inputs + outputs) each.

    Routed experts are one tensor a layer, which is not a linear layer.
    """
    sizes = 0
    for layer in range(shape.layers):
        heads, groups, dim = shape.heads, shape.key_value_heads, shape.head_dim
        if (latent := shape.latent) is not None:
            query, width = latent.query_rank or shape.hidden, latent.nope_dim + latent.rope_dim
            sizes += 2 * shape.hidden + latent.key_value_rank + latent.rope_dim + query + heads * latent.value_dim
            sizes += query + heads * width + latent.key_value_rank + heads * (latent.nope_dim + latent.value_dim)
            sizes += shape.hidden
        else:
            sizes += 4 * shape.hidden + 2 * heads * dim + 2 * groups * dim
        width = shape.shared_width if layer in shape.expert_layers else shape.width
        sizes += 3 * (shape.hidden + width) if width else 0
    return rank * sizes


def _trained(name: str, run: Run, count: int) -> list[Part]:
    each = run.master_bytes
    return [
        _shard(f"{name} weights", run, count, each, f"{each} bytes"),
        _shard(f"{name} gradients", run, count, each, f"{each} bytes", When.TRAINING),
        _shard(f"{name} optimizer", run, count, 2 * each, f"{2 * each} bytes of Adam's moments"),
    ]


def _adapted(run: Run) -> list[Part]:
    base, shape = run.policy.parameters.total, run.policy.shape
    parts = [_shard("policy weights, frozen", run, base, run.train_bytes, f"{run.train_bytes} bytes")]
    if shape is not None:
        count, each = adapter_parameters(shape, run.settings.lora_rank), _ADAPTER_BYTES
        parts.append(_shard("adapter and optimizer", run, count, 3 * each, f"{3 * each} bytes"))
        parts.append(_shard("adapter gradients", run, count, each, f"{each} bytes", When.TRAINING))
    return parts


def _shard(name: str, run: Run, count: int, each: int, what: str, when: When = When.ALWAYS) -> Part:
    divided = "" if run.ranks == 1 else f" / {run.ranks} ranks"
    return Part(name, count * each // run.ranks, f"{number(count)} parameters × {what}{divided}", when)


def _gathered(run: Run) -> list[Part]:
    """Return what is held in the type of the computation while a model works."""
    total, each = run.policy.parameters.total, run.train_bytes
    if run.alone:
        same = each == run.master_bytes or run.settings.lora_rank
        count = (_covered(run) if same else total) if run.training is not None else total * (not same)
        how = "cast from the masters" if run.training is None else f"rounded to {run.training.format}"
        formula = f"{number(count)} parameters × {each} bytes, {how}"
        return [Part("working weights", count * each, formula, When.TRAINING)] if count else []
    if (shape := run.policy.shape) is None:
        return []
    unit = max(layer_parameters(shape, layer).total for layer in {0, shape.layers - 1, shape.layers // 2})
    root = outer_parameters(shape).total
    reduced = max(unit, root)
    gathered = f"(embeddings and head of {number(root)} + 2 layers of {number(unit)}) × {each}"
    return [
        Part("gathered units", (root + 2 * unit) * each, gathered, When.TRAINING),
        Part(
            "gradients that are being reduced",
            reduced * (each + 4),
            f"{number(reduced)} × ({each} + 4 bytes)",
            When.TRAINING,
        ),
    ]


def _covered(run: Run) -> int:
    """Return the parameters that the trainer's recipe covers; all of them where the model's shape is not known."""
    shape, recipe = run.policy.shape, run.training
    if shape is None or recipe is None:
        return run.policy.parameters.total
    return covered_parameters(model_tensors(shape), recipe).total


def _copies(run: Run) -> list[Part]:
    """Return rank 0's reading of the model, and copies of earlier policies."""
    parts = []
    total = run.policy.parameters.total
    if run.ranks > 1:
        each = run.train_bytes if run.settings.lora_rank else run.master_bytes
        formula = f"rank 0 reads {number(total)} parameters × {each} bytes before they are sharded"
        parts.append(Part("reading the model", total * each, formula, When.LOADING))
    if run.old_policies:
        copies = run.old_policies + 1
        formula = (
            f"({run.old_policies} versions + the own one while they are asked) × {number(total)} × {run.master_bytes}"
        )
        size = copies * total * run.master_bytes // run.ranks
        parts.append(Part("old policies", size, f"{formula} × {run.master_bytes} / {run.ranks} ranks"))
    return parts
