"""The trainer's ranks with Megatron-Core: which parameters each pipeline stage has, and what they take.

Weights are held in the type of the computation; gradients add up in float32 buffers that are not sharded; float32
masters and Adam's two moments are sharded over replicas by the distributed optimizer alone (Megatron-LM,
docs/source/api-guide/dist_optimizer.md: 6 + 12/d bytes a parameter for d replicas, instead of 18). With
`optimizer_cpu_offload` they are in pinned host memory, and so is a copy of the gradients that belong to them.
"""

from __future__ import annotations

import contextlib
import dataclasses

from miles.memory.amount import Part, When, number
from miles.memory.fsdp import adapter_parameters
from miles.memory.model import ModelShape
from miles.memory.parameters import Parameters, layer_parameters, mtp_parameters
from miles.memory.run import Run
from miles.pipeline_split import PipelineSplit, SplitError, split_of


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Parallel sizes over `ranks` processes."""

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    distributed_optimizer: bool = False
    offloaded: bool = False
    """Whether the optimizer's state is in host memory."""
    moment_bytes: int = 8
    """Of Adam's two moments of a parameter, on the device."""
    split: PipelineSplit | None = None
    """Of layers over stages, where it is not even."""

    @property
    def replicas(self) -> int:
        """Ranks that share the optimizer's state of everything but experts: data- and context-parallel ones."""
        return max(1, self.ranks // (self.tensor * self.pipeline))

    @property
    def expert_replicas(self) -> int:
        """Ranks that share that of the same experts."""
        return max(1, self.ranks // (self.expert_tensor * self.expert * self.pipeline))

    def stage_of(self, rank: int) -> int:
        """Return the pipeline stage of a rank: consecutive ranks are one stage."""
        return rank // max(1, self.ranks // self.pipeline)


def layout_of(run: Run) -> Layout:
    """Return the layout that settings ask for."""
    s, split, virtual = run.settings, split_of(run.settings), run.settings.num_virtual_stages_per_pipeline_rank or 1
    with contextlib.suppress(SplitError):  # a check reports it
        virtual = virtual if run.policy.shape is None else split.virtual_stages(run.policy.shape.layers)
    return Layout(
        ranks=run.ranks,
        tensor=s.tensor_model_parallel_size,
        pipeline=s.pipeline_model_parallel_size,
        virtual=virtual,
        context=s.context_parallel_size,
        expert=s.expert_model_parallel_size,
        expert_tensor=s.expert_tensor_parallel_size,
        distributed_optimizer=s.use_distributed_optimizer,
        offloaded=s.optimizer_cpu_offload,
        moment_bytes=sum(4 if kind == "fp32" else 2 for kind in (s.exp_avg_dtype, s.exp_avg_sq_dtype)),
        split=None if split.is_even else split,
    )


def stage_layers(shape: ModelShape, layout: Layout, stage: int) -> list[int]:
    """Return the numbers of a stage's layers; virtual stages take turns. A split that does not fit counts as even."""
    with contextlib.suppress(SplitError):
        return (layout.split or PipelineSplit(layout.pipeline, layout.virtual)).layers_of(stage, shape.layers)
    each = max(1, shape.layers // (layout.pipeline * layout.virtual))
    starts = [(turn * layout.pipeline + stage) * each for turn in range(layout.virtual)]
    return [layer for start in starts for layer in range(start, start + each)]


def rank_parameters(shape: ModelShape, layout: Layout, stage: int, *, mtp_layers: int = 0) -> Parameters:
    """Return the parameters on each rank of a stage, as the largest one has them."""
    found = Parameters()
    for layer in stage_layers(shape, layout, stage):
        found += layer_parameters(shape, layer)
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        found += Parameters(embedding=_padded(shape, layout) * shape.hidden)
    if last:
        head = 0 if shape.tied and first else _padded(shape, layout) * shape.hidden
        found += Parameters(head=head, norms=shape.hidden)
        for _ in range(mtp_layers):
            found += mtp_parameters(shape)
    return on_rank(found, shape, layout)


def on_rank(stage: Parameters, shape: ModelShape, layout: Layout) -> Parameters:
    """Return what the largest rank has of a stage's parameters."""
    split = stage.split(layout.tensor, shape.key_value_heads)
    return dataclasses.replace(split, experts=-(-stage.experts // (layout.expert * layout.expert_tensor)))


def _padded(shape: ModelShape, layout: Layout) -> int:
    return -(-shape.vocabulary // layout.tensor) * layout.tensor


def megatron_parts(run: Run, stage: int) -> tuple[list[Part], list[Part]]:
    """Return what a rank of a stage takes on its device, and in host memory besides."""
    shape, layout, s = run.policy.shape, layout_of(run), run.settings
    if shape is None:
        return _by_count(run, layout)
    layers = s.mtp_num_layers or 0
    own = rank_parameters(shape, layout, stage, mtp_layers=layers)
    frozen = 0
    if layers and not s.enable_mtp_training:
        frozen = own.total - rank_parameters(shape, layout, stage).total
    if s.lora_rank:
        adapters = adapter_parameters(shape, s.lora_rank) // (layout.tensor * layout.pipeline)
        frozen = max(0, own.total - adapters)
    device, host = _trained("policy", run, layout, own, frozen)
    if s.enable_mtp_training and layout.pipeline > 1 and stage == layout.pipeline - 1 and not shape.tied:
        borrowed = -(-shape.vocabulary // layout.tensor) * shape.hidden
        formula = f"{number(borrowed)} × {run.train_bytes} bytes, the first stage's embeddings"
        device.append(Part("embeddings for MTP layers", borrowed * run.train_bytes, formula, When.TRAINING))
    if run.has_critic:
        critic = dataclasses.replace(rank_parameters(dataclasses.replace(shape, tied=False), layout, stage), head=0)
        there, here = _trained("critic", run, layout, critic, 0)
        device, host = device + there, host + here
    roles = ["reference"] * run.has_reference + ["teacher"] * len(run.teachers)
    copies = len(roles) + run.old_policies
    if copies:
        what = " + ".join([*roles, *([f"{run.old_policies} old policies"] if run.old_policies else [])])
        formula = f"({what} + the own one while they are asked) × {number(own.total)} × {run.train_bytes}"
        host.append(Part("weights that are swapped in", (copies + 1) * own.total * run.train_bytes, formula))
    return device, host


def _trained(name: str, run: Run, layout: Layout, own: Parameters, frozen: int) -> tuple[list[Part], list[Part]]:
    each, trained = run.train_bytes, own.total - frozen
    masters = 0 if each == 4 else 4
    experts, others = own.experts, trained - own.experts
    replicas, expert_replicas = (layout.replicas, layout.expert_replicas) if layout.distributed_optimizer else (1, 1)
    share = f"{number(trained)}"
    if layout.distributed_optimizer:
        share = f"({number(others)} / {replicas} replicas"
        share += f" + experts' {number(experts)} / {expert_replicas})" if experts else ")"

    def optimizer(bytes_each: int, kinds: str, where: str = "") -> Part:
        size = others * bytes_each // replicas + experts * bytes_each // expert_replicas
        return Part(f"{name} optimizer{where}", size, f"{bytes_each} bytes of {kinds} × {share}")

    kinds = "float32 masters and Adam's moments" if masters else "Adam's moments"
    device = [
        Part(f"{name} weights", own.total * each, f"{words(own)} × {each} bytes"),
        Part(f"{name} gradients", trained * 4, f"{number(trained)} × 4 bytes, in buffers that stay"),
    ]
    if layout.offloaded:
        return device, [optimizer(16, "masters, moments and gradients, pinned,", " on the host")]
    return [*device, optimizer(masters + layout.moment_bytes, kinds)], []


def words(own: Parameters) -> str:
    """Describe a rank's parameters."""
    experts = f", of which experts' {number(own.experts)}," if own.experts else ""
    return f"{number(own.total)} parameters of this rank{experts}"


def _by_count(run: Run, layout: Layout) -> tuple[list[Part], list[Part]]:
    """Return parts of a model whose shape is not known: split evenly."""
    share = Parameters(dense=run.policy.parameters.total // (layout.tensor * layout.pipeline))
    return _trained("policy", run, layout, share, 0)
