"""A tiny policy, and what a trainer would record of responses to its prompts."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from miles.drafts.recording import RecordedSample

VOCABULARY, LAYERS = 64, 4
SHARPNESS = 0.4


def tiny_policy(folder: pathlib.Path, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama whose next token mostly follows from the last one, and a little from all others."""
    generator = torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=False,
        initializer_range=0.1, eos_token_id=VOCABULARY - 1, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight.normal_(std=1.0)
        follower = torch.randperm(VOCABULARY, generator=generator)
        model.lm_head.weight[follower] = embeddings * SHARPNESS
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def record(
    policy: LlamaForCausalLM,
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
    tokens_BT = torch.randint(policy.config.vocab_size, (samples, prompt), generator=generator)
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
