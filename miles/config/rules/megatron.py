"""Rules about the layout of the Megatron-Core backend; `checks.model_layout` has those that need the model."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import needs, rule
from miles.config.schema.backend_choice import MEGATRON_ALONE, asks_for_megatron
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings

_FSDP_ALONE = {
    "gradient_checkpointing": "set recompute_granularity instead",
    "torch_compile": "leave it out",
    "fsdp_cpu_offload": "leave it out",
    "share_prompts": "leave it out, or train with fsdp",
    "attn_implementation": "set attention_backend or transformer_impl instead",
}

_OFFLOADING = ("optimizer_cpu_offload", "optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d")


@rule
def settings_belong_to_the_backend(s: FlatSettings) -> Iterator[Fault]:
    if s.train_backend == "megatron":
        for key, remedy in _FSDP_ALONE.items():
            value = getattr(s, key)
            if s.given(key) and value not in (False, "auto"):
                yield Fault(key, value, "train_backend = megatron does not have it", remedy)
        return
    for key, entry in catalog().items():
        if entry.section in MEGATRON_ALONE and asks_for_megatron(s, key):
            problem = f"train_backend = {s.train_backend} does not have it"
            other = "set fsdp_cpu_offload instead" if key in _OFFLOADING else "leave it out"
            yield Fault(key, getattr(s, key), problem, f"set train_backend to megatron, or {other}")


@rule
def layout_divides_ranks(s: FlatSettings) -> Iterator[Fault]:
    if s.train_backend != "megatron" or s.actor_num_gpus_per_node is None:
        return
    ranks = s.actor_num_nodes * s.actor_num_gpus_per_node
    what = f"actor_num_nodes × actor_num_gpus_per_node = {ranks}"
    dense = s.tensor_model_parallel_size * s.pipeline_model_parallel_size * s.context_parallel_size
    if ranks % dense:
        name = "tensor_model_parallel_size × pipeline_model_parallel_size × context_parallel_size"
        yield Fault(name, dense, f"it does not divide {what}", "choose sizes whose product does")
    experts = s.expert_tensor_parallel_size * s.expert_model_parallel_size * s.pipeline_model_parallel_size
    if ranks % experts and (s.expert_model_parallel_size > 1 or s.given("expert_tensor_parallel_size")):
        name = "expert_tensor_parallel_size × expert_model_parallel_size × pipeline_model_parallel_size"
        yield Fault(name, experts, f"it does not divide {what}", "choose sizes whose product does")


@rule
def layout_settings_have_an_effect(s: FlatSettings) -> Iterator[Fault]:
    if s.train_backend != "megatron":
        return
    if s.num_virtual_stages_per_pipeline_rank is not None and s.pipeline_model_parallel_size == 1:
        problem = "pipeline_model_parallel_size = 1 has no stages to cut"
        value = s.num_virtual_stages_per_pipeline_rank
        yield Fault("num_virtual_stages_per_pipeline_rank", value, problem, "leave it out, or add stages")
    if s.overlap_param_gather and not (s.use_distributed_optimizer and s.overlap_grad_reduce):
        problem = "it works with use_distributed_optimizer and overlap_grad_reduce alone"
        yield Fault("overlap_param_gather", True, problem, "turn both on, or leave it out")
    if s.moe_token_dispatcher_type == "allgather" and s.pipeline_model_parallel_size > 1:
        problem = "micro-batches of changing length go through pipeline stages with alltoall alone"
        yield Fault("moe_token_dispatcher_type", "allgather", problem, "set it to alltoall")


@rule
def optimizer_state_has_a_place(s: FlatSettings) -> Iterator[Fault]:
    if s.train_backend != "megatron":
        return  # another rule reports them
    yield from needs(s, "optimizer_offload_fraction", "optimizer_cpu_offload")
    yield from needs(s, "overlap_cpu_optimizer_d2h_h2d", "optimizer_cpu_offload")
    if s.optimizer_cpu_offload:
        if s.device == "cpu":
            problem = "device is cpu, so that all is there already"
            yield Fault("optimizer_cpu_offload", True, problem, "leave it out")
        if not s.use_precision_aware_optimizer:
            problem = "optimizer_cpu_offload has Adam hold the master parameters"
            yield Fault("use_precision_aware_optimizer", False, problem, "leave one of them out")
    elif s.use_precision_aware_optimizer and s.device == "cpu":
        problem = "it is TransformerEngine's Adam, which needs a GPU"
        yield Fault("use_precision_aware_optimizer", True, problem, "leave it out")
    if s.use_precision_aware_optimizer and not s.use_distributed_optimizer:
        problem = "use_precision_aware_optimizer is in the distributed optimizer alone"
        yield Fault("use_distributed_optimizer", False, problem, "leave one of them out")
    if s.use_precision_aware_optimizer and s.train_dtype == "float32":
        problem = "train_dtype = float32 has no master parameters besides the model's own"
        yield Fault("use_precision_aware_optimizer", True, problem, "leave it out, or train in 16 bits")
    for key in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        yield from needs(s, key, "use_precision_aware_optimizer")
        if getattr(s, key) != "fp32" and s.optimizer_cpu_offload:
            problem = "the CPU's Adam has moments in float32 alone"
            yield Fault(key, getattr(s, key), problem, "leave it out, or optimizer_cpu_offload")


@rule
def mtp_layers_are_loaded_to_be_trained(s: FlatSettings) -> Iterator[Fault]:
    yield from needs(s, "mtp_loss_scaling_factor", "enable_mtp_training")
    if s.enable_mtp_training and s.mtp_num_layers is None:
        problem = "mtp_num_layers is not set"
        yield Fault("enable_mtp_training", True, problem, "set mtp_num_layers to how many the model has")
    for key, part in (("pipeline_model_parallel_size", "the model"), ("context_parallel_size", "each sequence")):
        if s.enable_mtp_training and getattr(s, key) > 1:
            problem = f"MTP layers are trained only where a rank has all of {part}"
            yield Fault("enable_mtp_training", True, problem, f"set {key} to 1")


@rule
def recomputation_is_complete(s: FlatSettings) -> Iterator[Fault]:
    full = s.recompute_granularity == "full"
    for key in ("recompute_method", "recompute_num_layers"):
        value = getattr(s, key)
        if full and value is None:
            yield Fault(key, None, "recompute_granularity = full needs it", "set it, e.g. to uniform and 1")
        if not full and value is not None:
            yield Fault(key, value, "it does nothing without recompute_granularity = full", "leave it out")


@rule
def layers_fit_the_device(s: FlatSettings) -> Iterator[Fault]:
    if s.train_backend == "megatron" and s.transformer_impl == "transformer_engine" and s.device == "cpu":
        problem = "TransformerEngine needs a GPU"
        yield Fault("transformer_impl", s.transformer_impl, problem, "set it to local or auto")
