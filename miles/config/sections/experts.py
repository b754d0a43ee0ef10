"""The shape of a model's mixture-of-experts layers under Megatron's names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import field_validator

from miles.config.layer_frequency import parse_layer_frequency
from miles.config.schema.faults import misspelt
from miles.config.schema.section import Metavar, Positive, PositiveFloat, Section


class ExpertsConfig(Section):
    """Mixture-of-experts layers, compared with config.json as Architecture is."""

    num_experts: Positive | None = None
    """Number of routed experts of a layer."""

    moe_layer_freq: Annotated[str | None, Metavar("INT|LIST")] = None
    """Which layers have experts: every n-th one, or a list of 0 and 1 such as [0]*3+[1]*58."""

    moe_ffn_hidden_size: Positive | None = None
    """Width of an expert."""

    moe_shared_expert_intermediate_size: Positive | None = None
    """Width of all shared experts together."""

    moe_shared_expert_gate: bool | None = None
    """Whether the output of shared experts is gated."""

    moe_latent_size: Positive | None = None
    """Width that experts work in, where it is not that of the model."""

    moe_router_topk: Positive | None = None
    """Number of experts of a token."""

    moe_router_score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] | None = None
    """How routers score experts."""

    moe_router_pre_softmax: bool | None = None
    """Whether scores are made before the best experts are chosen, and not among them."""

    moe_router_enable_expert_bias: bool | None = None
    """Whether a bias of each expert has a part in the choice."""

    moe_router_topk_scaling_factor: PositiveFloat | None = None
    """Factor of the chosen experts' weights."""

    moe_router_num_groups: Positive | None = None
    """Number of groups that a layer's experts are in."""

    moe_router_group_topk: Positive | None = None
    """Number of groups from which a token's experts come."""

    @field_validator("moe_layer_freq", mode="before")
    @classmethod
    def _is_a_pattern(cls, value: Any) -> Any:
        if value is None:
            return None
        text = str(value).replace(" ", "")
        try:
            parse_layer_frequency(text)
        except ValueError as error:
            raise misspelt(str(error), "give a number, or a list like [0]*3+[1]*58") from error
        return text
