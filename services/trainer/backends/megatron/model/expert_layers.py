"""How experts are computed, chosen and balanced, as fields of Megatron-Core's TransformerConfig."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.config.sections.moe import MoeConfig


def computes_grouped(moe: MoeConfig, *, with_engine: bool) -> bool:
    """Whether the experts of a layer are multiplied in one product, so that their weights have grouped names."""
    return with_engine and moe.moe_grouped_gemm is not False


def expert_values(moe: MoeConfig, *, with_engine: bool, replays: bool) -> dict[str, Any]:
    """Values of the fields; `with_engine` for TransformerEngine's layers, `replays` where routing is prescribed."""
    return {
        "moe_grouped_gemm": computes_grouped(moe, with_engine=with_engine),
        "moe_permute_fusion": with_engine and moe.moe_permute_fusion is not False,
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type,
        "moe_flex_dispatcher_backend": moe.moe_flex_dispatcher_backend,
        "moe_shared_expert_overlap": with_engine and moe.moe_shared_expert_overlap,
        "moe_router_dtype": None if moe.moe_router_dtype == "none" else moe.moe_router_dtype,
        # Fused kernels choose before replay could.
        "moe_router_fusion": with_engine and not replays and moe.moe_router_fusion is not False,
        "moe_router_load_balancing_type": "aux_loss" if moe.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": moe.moe_aux_loss_coeff,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff or None,
        "moe_router_bias_update_rate": 0.0,  # `expert_bias` moves it
        "moe_enable_routing_replay": replays,
    }


def prepare_routers(moe: MoeConfig, config: Any, chunks: Sequence[Any]) -> None:
    """Freeze the gates of bare chunks if that is asked for.

    Raises ValueError for an update rate of biases that the model of this TransformerConfig does not have.
    """
    if moe.moe_router_bias_update_rate and not config.moe_router_enable_expert_bias:
        raise ValueError(
            f"moe_router_bias_update_rate = {moe.moe_router_bias_update_rate}, but the model's routers have no "
            "per-expert bias; leave it out, or balance experts by moe_aux_loss_coeff"
        )
    for chunk in chunks if moe.moe_router_freeze_gate else ():
        for name, parameter in chunk.named_parameters():
            if name.endswith(("mlp.router.weight", "mlp.router.bias")):
                parameter.requires_grad_(False)
