"""Rules about mixture-of-experts layers of the Megatron-Core backend."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings

_TYPES_WITHOUT_A_LOSS = {
    "none": "the type none has no loss",
    "seq_aux_loss": "samples are packed, and Megatron-Core would take a whole micro-batch for one sequence",
    "global_aux_loss": "Megatron-Core averages over the micro-batches of a step before this one, whatever their sizes",
}


@rule
def balancing_losses_are_of_micro_batches(s: FlatSettings) -> Iterator[Fault]:
    kind = s.moe_router_load_balancing_type
    if kind == "sinkhorn":
        problem = "it chooses other experts than the engine, which takes those with the highest scores"
        yield Fault("moe_router_load_balancing_type", kind, problem, "set it to aux_loss or none")
    elif s.moe_aux_loss_coeff and kind in _TYPES_WITHOUT_A_LOSS:
        remedy = "set it to aux_loss, or moe_aux_loss_coeff to 0"
        yield Fault("moe_router_load_balancing_type", kind, _TYPES_WITHOUT_A_LOSS[kind], remedy)


@rule
def expert_bias_is_frozen_or_moves(s: FlatSettings) -> Iterator[Fault]:
    if s.freeze_e_score_correction_bias and s.moe_router_bias_update_rate:
        problem = "moe_router_bias_update_rate moves it"
        yield Fault("freeze_e_score_correction_bias", True, problem, "leave one of them out")


@rule
def experts_get_every_token(s: FlatSettings) -> Iterator[Fault]:
    if s.moe_expert_capacity_factor is not None:
        problem = "engines drop no tokens, so that log-probabilities of trainer and engine would differ"
        yield Fault("moe_expert_capacity_factor", s.moe_expert_capacity_factor, problem, "leave it out")
    if s.moe_pad_expert_input_to_capacity:
        problem = "experts have no capacity: engines drop no tokens"
        yield Fault("moe_pad_expert_input_to_capacity", True, problem, "leave it out")
    if s.moe_input_jitter_eps is not None:
        problem = "old and new log-probabilities, and those of the engine, would differ by the noise"
        yield Fault("moe_input_jitter_eps", s.moe_input_jitter_eps, problem, "leave it out")


@rule
def routers_choose_where_replay_can_prescribe(s: FlatSettings) -> Iterator[Fault]:
    for key in ("use_rollout_routing_replay", "use_routing_replay"):
        if s.moe_router_fusion and getattr(s, key):
            problem = f"fused kernels choose experts before {key} could prescribe them"
            yield Fault("moe_router_fusion", True, problem, f"leave it out, or turn {key} off")


@rule
def dispatchers_fit_the_layout(s: FlatSettings) -> Iterator[Fault]:
    kind, ranks = s.moe_token_dispatcher_type, s.expert_tensor_parallel_size * s.expert_model_parallel_size
    if kind == "allgather" and (s.pipeline_model_parallel_size > 1 or s.expert_model_parallel_size > 1):
        problem = (
            "pipeline stages and expert-parallel ranks have micro-batches of different lengths, which it cannot send"
        )
        yield Fault("moe_token_dispatcher_type", kind, problem, "set it to alltoall")
    if kind == "flex" and ranks == 1:
        problem = "expert_tensor_parallel_size × expert_model_parallel_size = 1 leaves no rank to send tokens to"
        yield Fault("moe_token_dispatcher_type", kind, problem, "set it to alltoall, or split the experts")
    if kind == "flex" and s.moe_router_dtype != "fp32":
        problem = "the kernels of flex send weights in float32"
        yield Fault("moe_router_dtype", s.moe_router_dtype, problem, "set it to fp32, or the dispatcher to alltoall")
    if kind == "allgather" and s.moe_shared_expert_overlap:
        problem = "allgather leaves no time between sending tokens and computing experts"
        yield Fault("moe_shared_expert_overlap", True, problem, "leave it out, or set the dispatcher to alltoall")


@rule
def flex_has_one_kind_of_kernels(s: FlatSettings) -> Iterator[Fault]:
    if s.moe_token_dispatcher_type != "flex":
        if s.moe_enable_deepep:
            problem = f"moe_token_dispatcher_type = {s.moe_token_dispatcher_type} does not use it"
            yield Fault("moe_enable_deepep", True, problem, "set the type to flex, or leave it out")
        if s.moe_flex_dispatcher_backend != "deepep":
            problem = f"moe_token_dispatcher_type = {s.moe_token_dispatcher_type} has no such kernels"
            yield Fault("moe_flex_dispatcher_backend", s.moe_flex_dispatcher_backend, problem, "set the type to flex")
    elif s.moe_enable_deepep and s.moe_flex_dispatcher_backend != "deepep":
        problem = f"moe_flex_dispatcher_backend = {s.moe_flex_dispatcher_backend}"
        yield Fault("moe_enable_deepep", True, problem, "leave one of them out")


@rule
def overlapped_shared_experts_are_not_recomputed(s: FlatSettings) -> Iterator[Fault]:
    recomputed = s.recompute_granularity == "selective" and "shared_experts" in s.recompute_modules
    if s.moe_shared_expert_overlap and recomputed:
        problem = "recompute_modules has shared_experts, which are then computed by themselves"
        yield Fault("moe_shared_expert_overlap", True, problem, "leave one of them out")
