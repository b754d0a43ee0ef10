"""Routed experts of a real SGLang server on the CPU: equal to Hugging Face's, whole and from a position on."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
import torch
from sglang_kit import (
    ON_GPU,
    have_sglang,
    largest_difference,
    options,
    published_weights,
    reference_log_probs,
    respond,
    running,
)
from torch_engine_models import prompt_of, save_checkpoint

from miles.services.rollout.engines.base import FinishReason, PauseMode
from miles.services.rollout.engines.sglang import SglangEngine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
    pytest.mark.asyncio(loop_scope="module"),
]
TOP_K = 2
Experts = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("sglang-experts")


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> torch.nn.Module:
    return save_checkpoint(folder / "model", "qwen3_moe", 3, initializer_range=0.1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: pathlib.Path, model: torch.nn.Module) -> AsyncIterator[SglangEngine]:
    async with running(options(folder / "model", folder / "logs", routed_experts=True)) as started:
        await started.load_weights(0, published_weights(model))
        yield started


def reference_experts(model: torch.nn.Module, ids: Sequence[int]) -> Experts:
    """The experts that a plain forward pass chooses, ascending per token: (tokens - 1, 2, TOP_K)."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]), output_router_logits=True).router_logits
    chosen = torch.stack([layer.topk(TOP_K, dim=-1).indices for layer in logits], dim=1)
    return chosen.sort(dim=-1).values.numpy().astype(np.uint8)


async def test_experts_and_log_probs_are_those_of_hugging_face(engine: SglangEngine, model: torch.nn.Module) -> None:
    prompts = [prompt_of(7 + 9 * i, i) for i in range(4)]
    asked = (respond(engine, prompt, experts=True, group="g") for prompt in prompts)
    responses = await asyncio.gather(*asked)
    for prompt, response in zip(prompts, responses, strict=True):
        found = response.result.routed_experts
        assert found is not None
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(np.sort(found, axis=-1), reference_experts(model, [*prompt, *response.tokens]))
        assert largest_difference(response, reference_log_probs(model, prompt, response.tokens)) < 1e-5


async def test_experts_come_only_when_asked_for(engine: SglangEngine) -> None:
    assert (await respond(engine, prompt_of(7))).result.routed_experts is None


async def test_a_resumed_response_brings_only_its_new_rows(engine: SglangEngine, model: torch.nn.Module) -> None:
    prompt = prompt_of(11, 4)
    long = {"max_new_tokens": 300, "min_new_tokens": 300}
    before = engine.stats().generated_tokens
    task = asyncio.create_task(respond(engine, prompt, request_id="cut", experts=True, **long))
    while engine.stats().generated_tokens == before:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await engine.abort(["cut"])
    begun = await task
    assert begun.result.reason is FinishReason.ABORT
    first = begun.result.routed_experts
    assert first is not None
    assert len(first) == len(prompt) + len(begun.tokens) - 1
    rest = await respond(
        engine,
        [*prompt, *begun.tokens],
        resumed_tokens=len(begun.tokens),
        experts=True,
        experts_start=len(first),
        max_new_tokens=len(begun.tokens) + 10,
    )
    added = rest.result.routed_experts
    assert added is not None
    assert len(added) == len(rest.tokens)
    whole = np.sort(np.concatenate([first, added]), axis=-1)
    np.testing.assert_array_equal(whole, reference_experts(model, [*prompt, *begun.tokens, *rest.tokens]))


@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
async def test_experts_survive_a_pause(engine: SglangEngine, model: torch.nn.Module, mode: PauseMode) -> None:
    prompt = prompt_of(13, 5)
    before = engine.stats().generated_tokens
    long = {"max_new_tokens": 250, "min_new_tokens": 250}
    task = asyncio.create_task(respond(engine, prompt, experts=True, **long))
    while engine.stats().generated_tokens == before:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await engine.pause(mode)
    await engine.resume()
    response = await task
    found = response.result.routed_experts
    assert found is not None
    expected = reference_experts(model, [*prompt, *response.tokens])
    np.testing.assert_array_equal(np.sort(found, axis=-1), expected)


async def test_an_update_reaches_every_expert(engine: SglangEngine, model: torch.nn.Module) -> None:
    weights = published_weights(model)
    other = {name: tensor.flip(0).contiguous() for name, tensor in weights.items()}
    await engine.load_weights(1, other)
    await engine.weight_bytes()
    await engine.load_weights(2, weights)
    await engine.weight_bytes()
    response = await respond(engine, prompt_of(7))
    assert largest_difference(response, reference_log_probs(model, prompt_of(7), response.tokens)) < 1e-5
