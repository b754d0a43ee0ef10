"""Tiny random checkpoints and a driver of the torch engine, for its tests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from miles.services.rollout.engines.base import GenerationRequest, GenerationResult, SamplingParams
from miles.services.rollout.engines.torch import TorchEngine
from miles.weights.naming.model_tensors import once

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3")
END_TOKEN = 256
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": END_TOKEN,
    "bos_token_id": None,
    "pad_token_id": None,
}


def tiny_config(family: str) -> Any:
    """A configuration of the family that runs in milliseconds."""
    if family == "llama":
        return LlamaConfig(**_SIZES, tie_word_embeddings=True)
    if family == "qwen2":
        return Qwen2Config(**_SIZES, tie_word_embeddings=False)
    if family == "qwen3":
        return Qwen3Config(**_SIZES, tie_word_embeddings=True)
    if family == "deepseek_v3":
        return DeepseekV3Config(
            **{**_SIZES, "num_key_value_heads": 6, "head_dim": 8, "first_k_dense_replace": 1},
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, q_lora_rank=16, kv_lora_rank=16,
            n_routed_experts=8, n_shared_experts=1, n_group=2, topk_group=1, num_experts_per_tok=2,
            moe_intermediate_size=32,
        )  # fmt: skip
    return Qwen3MoeConfig(
        **_SIZES,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )


def save_checkpoint(folder: pathlib.Path, family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """Write a random checkpoint with a byte tokenizer; returns the float32 model.

    `changes` are made to the family's tiny configuration.
    """
    torch.manual_seed(seed)
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config._experts_implementation = "eager"
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return model.eval()


def weights_of(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The model's weights by HF name, tied ones once, as a trainer would send them to this engine."""
    held = once(model.state_dict(keep_vars=True))
    return {name: tensor.detach().to(dtype).clone() for name, tensor in held.items()}


@dataclasses.dataclass
class Response:
    """All deltas of a response put together."""

    tokens: list[int]
    log_probs: list[float]
    result: GenerationResult

    def __iter__(self) -> Any:
        return iter((self.tokens, self.log_probs, self.result))


@contextlib.asynccontextmanager
async def running_engine(
    folder: pathlib.Path, weights: dict[str, torch.Tensor] | None, version: int = 0, **options: Any
) -> AsyncIterator[TorchEngine]:
    """A started engine with these weights (None: none yet), closed at the end."""
    options = {"device": "cpu", "dtype": "float32", "command_timeout_s": 60.0, **options}
    engine = TorchEngine(folder, **options)
    await engine.start()
    try:
        if weights is not None:
            await engine.load_weights(version, weights)
        yield engine
    finally:
        await engine.close()


async def respond(
    engine: TorchEngine,
    prompt: Sequence[int],
    *,
    request_id: str = "r",
    resumed: Sequence[int] = (),
    routed: bool = False,
    earlier: Sequence[Sequence[int]] = (),
    **sampling: Any,
) -> Response:
    """Generate one response to its end."""
    params = SamplingParams(**{"max_new_tokens": 24, **sampling})
    request = GenerationRequest(
        *(request_id, [*prompt, *resumed], params, len(resumed), routed),
        earlier_responses=[np.array(response, np.int32) for response in earlier],
    )
    tokens: list[int] = []
    log_probs: list[float] = []
    result = None
    async with asyncio.timeout(400):
        async for delta in engine.generate(request):
            tokens += delta.token_ids
            log_probs += delta.log_probs
            result = delta.result
    assert result is not None
    return Response(tokens, log_probs, result)


def reference_log_probs(
    model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probabilities of the response's tokens by a plain Hugging Face forward pass, float32."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float() / temperature
    rows = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(response)[:, None])[:, 0]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """A prompt of random bytes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()
