"""The shape of latent and sparse attention, and the scaling of rotary positions, under Megatron's names."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Ignored, Metavar, NonNegative, Positive, PositiveFloat, Section

_KERNELS = "the layers that are built from config.json have their own kernels"


class AttentionConfig(Section):
    """Attention beyond the standard kind, compared with config.json as Architecture is."""

    multi_latent_attention: bool | None = None
    """Whether keys and values come from a common latent (MLA)."""

    q_lora_rank: Positive | None = None
    """Width of the latent of queries."""

    kv_lora_rank: Positive | None = None
    """Width of the latent of keys and values."""

    qk_head_dim: Positive | None = None
    """Width of the part of a query's head that is not rotated."""

    qk_pos_emb_head_dim: Positive | None = None
    """Width of the part that is."""

    v_head_dim: Positive | None = None
    """Width of a value's head."""

    rope_type: Literal["rope", "yarn"] | None = None
    """How rotary angles of latent attention are scaled."""

    rotary_scaling_factor: PositiveFloat | None = None
    """Factor by which the context is longer than in pre-training."""

    original_max_position_embeddings: Positive | None = None
    """Number of positions in pre-training."""

    beta_fast: PositiveFloat | None = None
    """Rotations above which YaRN leaves angles as they are."""

    beta_slow: PositiveFloat | None = None
    """Rotations below which YaRN scales angles wholly."""

    mscale: PositiveFloat | None = None
    """YaRN's coefficient of the scale of attention."""

    mscale_all_dim: PositiveFloat | None = None
    """YaRN's coefficient of that scale over all columns."""

    attention_output_gate: bool | None = None
    """Whether the output of attention is gated."""

    use_gated_attention: bool | None = None
    """The same, as plugins of slime and miles call it."""

    softmax_type: Literal["vanilla", "off-by-one", "learnable"] | None = None
    """Whether the softmax of attention has a sink."""

    window_size: Annotated[str | None, Metavar("LEFT,RIGHT")] = None
    """Tokens that sliding windows see before and after one."""

    window_attn_skip_freq: Positive | None = None
    """Of how many layers one sees all tokens."""

    experimental_attention_variant: Literal["gated_delta_net", "dsa", "dsv4"] | None = None
    """Kind of attention of which Megatron calls its implementation experimental."""

    dsa_indexer_n_heads: Positive | None = None
    """Number of heads of the indexer of sparse attention."""

    dsa_indexer_head_dim: Positive | None = None
    """Width of an indexer's head."""

    dsa_indexer_topk: Positive | None = None
    """Number of tokens that an indexer chooses."""

    dsa_attention_backend: Annotated[Literal["megatron", "tilelang"] | None, Ignored(_KERNELS)] = None
    """Kernels of sparse attention."""

    miles_dsa_topk_backend: Annotated[Literal["torch", "flashinfer"] | None, Ignored(_KERNELS)] = None
    """Kernel of an indexer's choice."""

    dsv4_window_size: Positive | None = None
    """Window of DeepSeek V4's local attention."""

    dsv4_compress_ratios: tuple[NonNegative, ...] | None = None
    """Tokens that each layer joins into one."""

    dsv4_compress_rope_theta: PositiveFloat | None = None
    """Base of the rotary angles of joined tokens."""

    dsv4_n_hash_layers: NonNegative | None = None
    """Number of first layers that route by the token."""

    dsv4_hc_mult: Positive | None = None
    """Number of residual streams (hyper-connections)."""

    dsv4_hc_sinkhorn_iters: Positive | None = None
    """Iterations that normalise how these streams mix."""

    dsv4_o_groups: Positive | None = None
    """Groups of heads in the output projection."""

    dsv4_o_lora_rank: Positive | None = None
    """Width of the latent of each group."""
