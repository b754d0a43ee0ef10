"""Random models of a given size, created on the fly, with a byte tokenizer."""

from __future__ import annotations

import pathlib
from typing import Any

VOCABULARY = 32000
TINY_VOCABULARY = 1024
WIDE_SIZES = (*("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),)
WIDE = {
    "wide": (4096, 14336, 4, 32, 8),
    "wider": (8192, 28672, 2, 64, 8),
    "wide-served": (2560, 9728, 24, 32, 8),
    "tiny-wide": (128, 256, 1, 2, 1),
}
"""Dense models of which all matrices are multiples of 128, heads too."""


def config_of(kind: str) -> Any:
    """Configuration of `dense` (0.18 B parameters), `moe` (0.4 B, 32 experts) or `large` (2 B: 4 GB in bfloat16).

    `wide` has four layers of Llama-3-8B's sizes, `wider` two of Llama-3-70B's, and `wide-served` 24 of Qwen3-4B's
    (2.6 B); `wide-moe` is a mixture of 2.8 B, of which a token meets 0.9 B. `tiny`, `tiny-moe` and `tiny-wide` have the
    shapes of others, and next to no arithmetic: for a CPU.
    """
    from transformers import Qwen3Config, Qwen3MoeConfig

    vocabulary = TINY_VOCABULARY if kind.startswith("tiny") else VOCABULARY
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "head_dim": 64,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": vocabulary - 1,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "dense":
        return Qwen3Config(
            **common, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16
        )
    if kind == "moe":
        return Qwen3MoeConfig(
            **common | {"tie_word_embeddings": False},  # SGLang has no tied ones of this type
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=12,
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=512,
            norm_topk_prob=True,
        )
    if kind == "large":
        return Qwen3Config(
            **common, hidden_size=2048, intermediate_size=8192, num_hidden_layers=31, num_attention_heads=32
        )
    if kind in WIDE:
        sizes: dict[str, Any] = dict(zip(WIDE_SIZES, WIDE[kind], strict=True))
        return Qwen3Config(**common | {"head_dim": 128, "tie_word_embeddings": False} | sizes)
    if kind == "wide-moe":
        return Qwen3MoeConfig(
            **common | {"head_dim": 128, "tie_word_embeddings": False},
            hidden_size=2048,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=1024,
            norm_topk_prob=True,
        )
    if kind == "tiny":
        return Qwen3Config(**common, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    if kind == "tiny-moe":
        return Qwen3MoeConfig(
            **common | {"tie_word_embeddings": False},
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=32,
            norm_topk_prob=True,
        )
    raise ValueError(
        f"no model called {kind!r}: choose dense, moe, large, {', '.join(WIDE)}, wide-moe, tiny or tiny-moe"
    )


def write_tokenizer(folder: pathlib.Path, vocabulary: int = VOCABULARY) -> None:
    """A tokenizer of bytes, whose end token is the last of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {f"<{i}>": i for i in range(len(words), vocabulary - 1)} | {"<|end|>": vocabulary - 1}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def write_checkpoint(folder: pathlib.Path, kind: str, *, weights: bool) -> pathlib.Path:
    """A Hugging Face checkpoint in bfloat16; without `weights` it has configuration and tokenizer alone."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(kind)
    if weights:
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    else:
        config.architectures = ["Qwen3MoeForCausalLM" if kind.endswith("moe") else "Qwen3ForCausalLM"]
        config.dtype = "bfloat16"
        config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    return folder
