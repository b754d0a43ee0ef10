"""Mixture-of-experts layers of the Megatron-Core backend, under Megatron's names."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import NonNegativeFloat, Section, States


class MoeConfig(Section):
    """Experts, their routers and the way of tokens to them, for train_backend megatron."""

    moe_grouped_gemm: bool | None = None
    """Multiply all experts of a layer in one grouped product; not given does so where TransformerEngine is installed,
    and `--no-moe-grouped-gemm` computes one expert after the other."""

    moe_permute_fusion: bool | None = None
    """Sort tokens by expert in fused kernels; not given does so where TransformerEngine is installed."""

    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens are sent to their experts; flex sends them by the kernels of moe_flex_dispatcher_backend."""

    moe_flex_dispatcher_backend: Literal["deepep", "hybridep"] = "deepep"
    """Kernels of the dispatcher flex, both of the package deep_ep."""

    moe_enable_deepep: bool = False
    """The older name of moe_flex_dispatcher_backend deepep; requires moe_token_dispatcher_type flex."""

    moe_shared_expert_overlap: bool = False
    """Compute shared experts while tokens are on their way to the others; needs TransformerEngine."""

    moe_router_dtype: Literal["fp32", "fp64", "none"] = "fp32"
    """Number type of routers' scores and of the weights of chosen experts; none is that of the hidden states."""

    moe_router_fusion: bool | None = None
    """Choose experts in fused kernels; not given does so where TransformerEngine is installed and no routing is
    replayed."""

    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"] = (
        "aux_loss"
    )
    """The loss that moe_aux_loss_coeff weights: over a micro-batch (aux_loss); the other types are accepted where no
    loss is weighted, and sinkhorn, which chooses experts, is not."""

    moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss of mixture-of-experts layers."""

    moe_z_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the z-loss, which keeps routers' logits small."""

    moe_router_bias_update_rate: NonNegativeFloat = 0.0
    """How far each optimizer step moves a router's per-expert bias towards balance, for models that have one; 0 leaves
    it as it is."""

    moe_router_freeze_gate: bool = False
    """Do not train routers."""

    freeze_e_score_correction_bias: Annotated[
        bool | None, States(True, "no gradient reaches routers' per-expert bias, and moe_router_bias_update_rate is 0")
    ] = None
    """Leave routers' per-expert bias as it is."""

    moe_token_drop_policy: Literal["probs", "position"] | None = None
    """Which tokens to drop beyond an expert's capacity; none are dropped, because there is no capacity."""

    moe_expert_capacity_factor: float | None = None
    """Tokens of an expert relative to an equal share; is refused, because engines drop none."""

    moe_pad_expert_input_to_capacity: bool = False
    """Pad experts' tokens to moe_expert_capacity_factor; is refused with it."""

    moe_input_jitter_eps: float | None = None
    """Noise of routers' inputs; is refused, because old and new log-probabilities would differ by it."""
