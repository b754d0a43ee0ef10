"""Rules about the layout of the Megatron-Core backend; `checks.model_layout` has those that need the model."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import needs, rule
from miles.config.schema.backend_choice import MEGATRON_SECTIONS, asks_for_megatron
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

_OFFLOADING = ("optimizer_cpu_offload", "overlap_cpu_optimizer_d2h_h2d")


@rule
def settings_belong_to_the_backend(s: FlatSettings) -> Iterator[Fault]:
    if s.train_backend == "megatron":
        for key, remedy in _FSDP_ALONE.items():
            value = getattr(s, key)
            if s.given(key) and value not in (False, "auto"):
                yield Fault(key, value, "train_backend = megatron does not have it", remedy)
        return
    for key, entry in catalog().items():
        if entry.section in MEGATRON_SECTIONS and asks_for_megatron(s, key):
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
    if s.overlap_param_gather and not (s.use_distributed_optimizer and s.overlap_grad_reduce):
        problem = "it works with use_distributed_optimizer and overlap_grad_reduce alone"
        yield Fault("overlap_param_gather", True, problem, "turn both on, or leave it out")


_PIPELINE = (
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


@rule
def stages_are_split_in_one_way(s: FlatSettings) -> Iterator[Fault]:
    if s.train_backend != "megatron":
        return
    split = [key for key in _PIPELINE if getattr(s, key) not in (None, False)]
    if s.pipeline_model_parallel_size == 1:
        for key in split:
            problem = "pipeline_model_parallel_size = 1 has no stages to cut"
            yield Fault(key, getattr(s, key), problem, "leave it out, or add stages")
        return
    ends, counted = _PIPELINE[2:4], _PIPELINE[4:6]
    pairs = [("pipeline_model_parallel_layout", other) for other in _PIPELINE[1:6]]
    pairs += [("num_layers_per_virtual_pipeline_stage", other) for other in (_PIPELINE[0], *ends)]
    pairs += [(one, other) for one in counted for other in ends]
    for one, other in pairs:
        if one in split and other in split:
            problem = f"{other} splits the layers in another way"
            yield Fault(one, getattr(s, one), problem, "leave one of them out")


@rule
def optimizer_state_has_a_place(s: FlatSettings) -> Iterator[Fault]:
    if s.train_backend != "megatron":
        return  # another rule reports them
    yield from needs(s, "overlap_cpu_optimizer_d2h_h2d", "optimizer_cpu_offload")
    if s.optimizer_cpu_offload and not s.use_precision_aware_optimizer:
        problem = "optimizer_cpu_offload has Adam hold the master parameters"
        yield Fault("use_precision_aware_optimizer", False, problem, "leave one of them out")
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
def padded_batches_fit_the_rest(s: FlatSettings) -> Iterator[Fault]:
    if s.qkv_format != "bshd":
        return
    whys = {
        f"train_backend = {s.train_backend} packs samples": s.train_backend != "megatron",
        f"context_parallel_size = {s.context_parallel_size} cuts packed samples": s.context_parallel_size > 1,
        "moe_aux_loss_coeff would balance padding too": s.moe_aux_loss_coeff > 0,
    }
    for why, applies in whys.items():
        if applies:
            yield Fault("qkv_format", "bshd", why, "set it to thd, which is faster too")


@rule
def mtp_layers_are_loaded_to_be_trained(s: FlatSettings) -> Iterator[Fault]:
    yield from needs(s, "mtp_loss_scaling_factor", "enable_mtp_training")
    if s.enable_mtp_training and s.mtp_num_layers is None:
        problem = "mtp_num_layers is not set"
        yield Fault("enable_mtp_training", True, problem, "set mtp_num_layers to how many the model has")
    if s.enable_mtp_training and s.recompute_method == "uniform" and (s.recompute_num_layers or 1) > 1:
        problem = "MTP layers are recomputed one by one, as recompute_method = uniform does all layers"
        yield Fault("recompute_num_layers", s.recompute_num_layers, problem, "set it to 1")


@rule
def recomputation_is_complete(s: FlatSettings) -> Iterator[Fault]:
    full = s.recompute_granularity == "full"
    for key in ("recompute_method", "recompute_num_layers"):
        value = getattr(s, key)
        if full and value is None:
            yield Fault(key, None, "recompute_granularity = full needs it", "set it, e.g. to uniform and 1")
        if not full and value is not None:
            yield Fault(key, value, "it does nothing without recompute_granularity = full", "leave it out")


_RECOMPUTABLE = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
"""Parts of a layer that Megatron-Core can recompute, of the layers that are known here."""


@rule
def recomputed_modules_are_parts_of_layers(s: FlatSettings) -> Iterator[Fault]:
    modules = " ".join(s.recompute_modules)
    if s.recompute_granularity != "selective" and s.recompute_modules != catalog()["recompute_modules"].default:
        problem = "it does nothing without recompute_granularity = selective"
        yield Fault("recompute_modules", modules, problem, "set that, or leave it out")
    for name in s.recompute_modules:
        if name not in _RECOMPUTABLE:
            yield Fault("recompute_modules", name, "it is no part of a layer", f"choose of {', '.join(_RECOMPUTABLE)}")
    if "moe_act" in s.recompute_modules and s.moe_grouped_gemm is False:
        problem = "it is a part of grouped experts, and moe_grouped_gemm is off"
        yield Fault("recompute_modules", "moe_act", problem, "leave one of them out")


@rule
def shapes_change_from_one_micro_batch_to_the_next(s: FlatSettings) -> Iterator[Fault]:
    if s.cuda_graph_impl != "none":
        problem = "a CUDA graph has fixed shapes, and micro-batches differ in length"
        yield Fault("cuda_graph_impl", s.cuda_graph_impl, problem, "leave it out")


@rule
def layers_fit_the_device(s: FlatSettings) -> Iterator[Fault]:
    if s.train_backend == "megatron" and s.transformer_impl == "transformer_engine" and s.device == "cpu":
        problem = "TransformerEngine needs a GPU"
        yield Fault("transformer_impl", s.transformer_impl, problem, "set it to local or auto")
