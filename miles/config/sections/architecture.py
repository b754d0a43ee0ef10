"""The shape of the model under Megatron's names: layers, norms, embeddings, rotary positions."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Ignored, Negated, Positive, PositiveFloat, Section


class ArchitectureConfig(Section):
    """What the model is like, as launch scripts for Megatron say it. A model is built from its config.json: a setting
    of this section and the next two changes nothing, and one that differs from config.json is refused."""

    num_layers: Positive | None = None
    """Number of layers."""

    hidden_size: Positive | None = None
    """Width of the residual stream."""

    ffn_hidden_size: Positive | None = None
    """Width of the dense layers' feed-forward part."""

    num_attention_heads: Positive | None = None
    """Number of attention heads."""

    group_query_attention: bool | None = None
    """Whether several heads share keys and values."""

    num_query_groups: Positive | None = None
    """Number of key/value heads."""

    kv_channels: Positive | None = None
    """Width of an attention head."""

    normalization: Literal["LayerNorm", "RMSNorm"] | None = None
    """Kind of norms."""

    norm_epsilon: PositiveFloat | None = None
    """Epsilon of norms."""

    apply_layernorm_1p: bool | None = None
    """Whether norms multiply by 1 + weight."""

    qk_layernorm: bool | None = None
    """Whether queries and keys are normed; of latent attention, whether latents are."""

    post_self_attn_layernorm: bool | None = None
    """Whether the output of attention is normed."""

    post_mlp_layernorm: bool | None = None
    """Whether the output of the feed-forward part is normed."""

    swiglu: bool | None = None
    """Whether the feed-forward part is gated by SiLU."""

    activation_func_clamp_value: PositiveFloat | None = None
    """Bound of what goes into the gated activation."""

    activation_func_clamp_shared_expert: Annotated[
        bool | None, Negated("--no-activation-func-clamp-shared-expert"), Ignored("the model's own code decides it")
    ] = None
    """Whether that bound applies to shared experts."""

    add_bias_linear: Annotated[bool | None, Negated("--disable-bias-linear")] = None
    """Whether linear layers have biases."""

    add_qkv_bias: bool | None = None
    """Whether the projections to queries, keys and values have biases."""

    untie_embeddings_and_output_weights: bool | None = None
    """Whether the output layer has weights of its own."""

    vocab_size: Positive | None = None
    """Number of tokens of the vocabulary."""

    make_vocab_size_divisible_by: Annotated[
        Positive | None, Ignored("the vocabulary is padded as far as tensor parallelism needs")
    ] = None
    """What Megatron pads the vocabulary to a multiple of."""

    max_position_embeddings: Positive | None = None
    """Number of positions that the model knows."""

    position_embedding_type: Literal["learned_absolute", "rope", "yarn", "mrope", "none"] | None = None
    """Kind of position embeddings."""

    add_position_embedding: Annotated[bool | None, Negated("--no-position-embedding")] = None
    """Whether embeddings of positions are added to those of tokens."""

    use_rotary_position_embeddings: bool | None = None
    """Whether positions are rotary; same as position_embedding_type = rope."""

    rotary_base: PositiveFloat | None = None
    """Base of the rotary angles."""

    rotary_percent: PositiveFloat | None = None
    """Share of a head's width that is rotated."""

    rotary_interleaved: bool | None = None
    """Whether neighbouring columns are rotated together, rather than the two halves."""

    use_rope_scaling: bool | None = None
    """Whether rotary angles are scaled as Llama 3.1 does."""

    spec: tuple[str, ...] | None = None
    """Module and function of Megatron's layers; the plugins of slime and miles are accepted, as layers follow from the
    model's config.json."""
