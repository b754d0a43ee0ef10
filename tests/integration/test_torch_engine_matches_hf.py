"""The engine against plain Hugging Face code on tiny models of each family."""

from __future__ import annotations

import asyncio
import pathlib

import pytest
import torch
from torch_engine_models import (
    END_TOKEN,
    FAMILIES,
    prompt_of,
    reference_log_probs,
    respond,
    running_engine,
    save_checkpoint,
    weights_of,
)

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("family", FAMILIES)
async def test_log_probs_equal_a_plain_forward_pass(tmp_path: pathlib.Path, family: str) -> None:
    model = save_checkpoint(tmp_path, family)
    prompts = [prompt_of(length, length) for length in (3, 17, 40, 70)]
    async with running_engine(tmp_path, weights_of(model)) as engine:
        responses = await asyncio.gather(
            *(
                respond(engine, prompt, request_id=str(i), seed=i, temperature=0.7, max_new_tokens=60)
                for i, prompt in enumerate(prompts)
            )
        )
    for prompt, response in zip(prompts, responses, strict=True):
        expected = reference_log_probs(model, prompt, response.tokens, 0.7)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_tokens_equal_generate(tmp_path: pathlib.Path, family: str) -> None:
    model = save_checkpoint(tmp_path, family)
    prompt = prompt_of(12)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=END_TOKEN)
    async with running_engine(tmp_path, weights_of(model)) as engine:
        response = await respond(engine, prompt, temperature=0.0, max_new_tokens=40)
    assert response.tokens == expected[0, len(prompt) :].tolist()


async def test_routed_experts_equal_the_routers(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "qwen3_moe")
    prompt = prompt_of(21)
    async with running_engine(tmp_path, weights_of(model)) as engine:
        owner, sharer = await asyncio.gather(
            *(respond(engine, prompt, request_id=str(i), seed=i, routed=True) for i in range(2))
        )
        without = await respond(engine, prompt)
    assert without.result.routed_experts is None
    assert sharer.result.cached_prompt_tokens == len(prompt)
    for response in (owner, sharer):
        ids = torch.tensor([[*prompt, *response.tokens]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
        expected = torch.stack([layer.softmax(-1).topk(2, dim=-1).indices for layer in logits], dim=1)[:-1]
        routed = response.result.routed_experts
        assert routed is not None
        assert routed.dtype == "uint8"
        assert routed.tolist() == expected.tolist()


async def test_routed_experts_are_none_for_a_dense_model(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "qwen3")
    async with running_engine(tmp_path, weights_of(model)) as engine:
        response = await respond(engine, prompt_of(4), routed=True)
    assert response.result.routed_experts is None


async def test_a_prompt_longer_than_one_prefill_is_computed_in_chunks(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "qwen3")
    prompt = prompt_of(150)
    async with running_engine(tmp_path, weights_of(model), max_prefill_tokens=32) as engine:
        responses = await asyncio.gather(*(respond(engine, prompt, request_id=str(i), seed=i) for i in range(3)))
    for response in responses:
        expected = reference_log_probs(model, prompt, response.tokens)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-5, rtol=0)
    assert sorted(response.result.cached_prompt_tokens for response in responses) == [0, 150, 150]
