"""What the engine reads of a checkpoint: whether it can run the architecture, its sizes, and its end tokens."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from miles.weights.hf_folder.model_config import read_model_config

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


_LIMITS = {
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "deepseek_sparse_attention": "index_topk",
}
"""By type of a layer, what says how many tokens its rows see at most; in shorter sequences its attention is full."""


class UnsupportedModel(ValueError):
    """The checkpoint's architecture needs something that this engine lacks."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """What the engine needs to know of an architecture."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    """Elements of a head's queries and keys."""
    hidden_size: int
    intermediate_size: int
    vocabulary: int
    max_positions: int
    experts: int = 0
    """Routed experts of a mixture-of-experts layer; 0 in a dense model."""
    latent_value_dim: int | None = None
    """Elements of a head's values in multi-head latent attention, where they are not as many as those of its keys."""

    @property
    def value_dim(self) -> int:
        """Elements of a head's values."""
        return self.head_dim if self.latent_value_dim is None else self.latent_value_dim


def read_config(hf_checkpoint: str | pathlib.Path, max_total_tokens: int | None = None) -> Any:
    """The checkpoint's configuration.

    Raises UnsupportedModel when the engine cannot run its architecture, or not for responses of so many tokens with
    their prompts (None: as many as the model has positions).
    """
    config = read_model_config(hf_checkpoint)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{hf_checkpoint}: {config.model_type} is an encoder-decoder, not a causal LM")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if others := sorted(layer_types - {"full_attention", *_LIMITS}):
        raise UnsupportedModel(
            f"{hf_checkpoint}: {config.model_type} has layers of type {', '.join(others)}; the torch engine runs "
            "layers with attention only"
        )
    if getattr(config, "use_sliding_window", True):
        layer_types.add("sliding_attention")
    longest = max_total_tokens or int(config.max_position_embeddings)
    for key in sorted(_LIMITS[kind] for kind in layer_types & _LIMITS.keys()):
        limit = getattr(config, key, None)
        if limit and longest > limit:
            raise UnsupportedModel(
                f"{hf_checkpoint}: {key}={limit}, and the torch engine's attention sees all tokens; set "
                f"rollout_max_context_len to at most {limit}, or take another engine"
            )
    return config


def read_checkpoint(
    hf_checkpoint: pathlib.Path, max_total_tokens: int | None
) -> tuple[Any, PreTrainedTokenizerBase, tuple[int, ...]]:
    """The checkpoint's configuration (see `read_config`), tokenizer and end tokens."""
    config = read_config(hf_checkpoint, max_total_tokens)
    return config, AutoTokenizer.from_pretrained(hf_checkpoint), end_token_ids(hf_checkpoint, config)


def model_shape(config: Any) -> ModelShape:
    """Sizes out of a configuration."""
    heads = int(config.num_attention_heads)
    latent = getattr(config, "kv_lora_rank", None) is not None
    key_dim = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim) if latent else 0
    return ModelShape(
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=key_dim or int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden_size=int(config.hidden_size),
        intermediate_size=_largest(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        vocabulary=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        experts=next((int(count) for name in _EXPERT_COUNTS if (count := getattr(config, name, None))), 0),
        latent_value_dim=int(config.v_head_dim) if latent else None,
    )


def _largest(sizes: int | Sequence[int]) -> int:
    """The largest of the sizes that layers have (Gemma 3n has one for each), or the one of all."""
    return int(sizes) if isinstance(sizes, int) else max(map(int, sizes))


def end_token_ids(hf_checkpoint: str | pathlib.Path, config: Any) -> tuple[int, ...]:
    """The model's own end tokens: of generation_config.json where there is one, else of config.json."""
    ids: Any = None
    if (pathlib.Path(hf_checkpoint) / "generation_config.json").exists():
        ids = GenerationConfig.from_pretrained(hf_checkpoint).eos_token_id
    if ids is None:
        ids = getattr(config, "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
