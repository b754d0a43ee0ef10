"""A tiny policy, and what a trainer would record of responses to its prompts."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch_engine_models import save_checkpoint

from miles.drafts.recording import RecordedSample
from miles.drafts.trainable import Trainable
from miles.services.trainer.drafts.learner import DraftLearner, LearnerOptions

TOKENS, LAYERS = 64, 4
"""Tokens that it reads and says."""
_SHARPNESS = 0.4


def tiny_policy(folder: pathlib.Path, seed: int = 0) -> Any:
    """A checkpoint of a random Llama whose next token mostly follows from the last one, a little from all others."""
    model: Any = save_checkpoint(
        folder, "llama", seed, num_hidden_layers=LAYERS, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, initializer_range=0.1, layer_types=None,
    )  # fmt: skip
    generator = torch.manual_seed(seed)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight.normal_(std=1.0)
        follower = torch.randperm(TOKENS, generator=generator)
        model.lm_head.weight.zero_()
        model.lm_head.weight[follower] = embeddings[:TOKENS] * _SHARPNESS
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def record(
    policy: Any,
    *,
    samples: int,
    prompt: int,
    response: int,
    layers: Sequence[int],
    seed: int,
    top: int = 8,
) -> list[RecordedSample]:
    """Responses sampled at temperature 1, with what the policy's forward pass over them computed."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(TOKENS, (samples, prompt), generator=generator)
    cache = None
    for _ in range(response):
        output = policy(tokens_BT if cache is None else tokens_BT[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        next_B1 = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)
        tokens_BT = torch.cat([tokens_BT, next_B1], dim=1)
    output = policy(tokens_BT, output_hidden_states=True)
    log_probs_BRK, tokens_BRK = output.logits[:, prompt - 1 : -1].log_softmax(-1).topk(top)
    return [
        RecordedSample(
            tokens_T=tokens_BT[i],
            prompt_length=prompt,
            hidden_TD={layer: output.hidden_states[layer + 1][i, :-1] for layer in layers},
            top_tokens_RK=tokens_BRK[i],
            top_log_probs_RK=log_probs_BRK[i],
            loss_mask_R=torch.ones(response, dtype=torch.bool),
        )
        for i in range(samples)
    ]


def save_standalone(folder: pathlib.Path, seed: int = 1, head_dim: int = 12) -> None:
    """A checkpoint of a smaller random Llama with the policy's tokens."""
    save_checkpoint(
        folder, "llama", seed, num_hidden_layers=1, hidden_size=24, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, head_dim=head_dim, tie_word_embeddings=False, initializer_range=0.1, layer_types=None,
    )  # fmt: skip


def learner_of(model: Trainable, *, batch_tokens: int = 768, passes: int = 1) -> DraftLearner:
    """A learner that is quick with tiny models."""
    return DraftLearner(model, LearnerOptions(1e-2, batch_tokens, passes, torch.float32))


def lessons_of(policy: Any, layers: Sequence[int], seed: int = 0) -> list[RecordedSample]:
    """Enough responses to learn the policy from."""
    return record(policy, samples=128, prompt=8, response=40, layers=layers, seed=seed)


def teach(learner: DraftLearner, lessons: Sequence[RecordedSample], rounds: int) -> list[Mapping[str, float]]:
    """Train on lessons again and again; returns what each optimizer step found."""
    return [found for _ in range(rounds) for found in learner.learn(lessons)]
