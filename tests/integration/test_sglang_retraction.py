"""Routing of responses that a real SGLang server on the CPU takes the cache from: tokens, versions and experts fit.

The oracle is a plain forward pass of the weights that sampled a token, in float32.
"""

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
    CPU_FLAGS,
    ON_GPU,
    Response,
    have_sglang,
    options,
    published_weights,
    reference_log_probs,
    respond,
    running,
)
from torch_engine_models import prompt_of, save_checkpoint

from miles.services.rollout.engines.base import FinishReason, PauseMode
from miles.services.rollout.engines.sglang import SglangEngine
from miles.types import VersionSpan

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
    pytest.mark.asyncio(loop_scope="module"),
]
TOP_K = 2
REQUESTS, LENGTH = 4, 100
SLOTS = 300
"""Room for two whole responses and a half."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("sglang-retraction")


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> torch.nn.Module:
    return save_checkpoint(folder / "model", "qwen3_moe", 3, initializer_range=0.1)


@pytest.fixture(scope="module")
def newer(folder: pathlib.Path, model: torch.nn.Module) -> torch.nn.Module:
    """Other weights, which choose other experts."""
    return save_checkpoint(folder / "newer", "qwen3_moe", 4, initializer_range=0.1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: pathlib.Path, model: torch.nn.Module) -> AsyncIterator[SglangEngine]:
    flags = {**CPU_FLAGS, "max_total_tokens": SLOTS, "schedule_conservativeness": 0.01, "stream_interval": 4}
    given = options(
        folder / "model", folder / "logs", routed_experts=True, server_flags=flags, max_total_tokens=SLOTS // 2
    )
    with pytest.MonkeyPatch.context() as patch:
        # It takes requests as if their responses would stay short, so that it runs out of room.
        patch.setenv("SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION", "16")
        async with running(given) as started:
            yield started


def reference_experts(model: torch.nn.Module, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The experts that a plain forward pass chooses, ascending per token: (tokens - 1, 2, TOP_K)."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]), output_router_logits=True).router_logits
    chosen = torch.stack([layer.topk(TOP_K, dim=-1).indices for layer in logits], dim=1)
    return chosen.sort(dim=-1).values.numpy().astype(np.uint8)


def experts_of(response: Response) -> npt.NDArray[np.uint8]:
    assert response.result.routed_experts is not None
    return np.sort(response.result.routed_experts, axis=-1)


Begun = tuple[list[int], asyncio.Task[Response]]


async def begin(engine: SglangEngine, count: int) -> list[Begun]:
    """Prompts and running requests, whose responses are all `LENGTH` long and have begun."""
    found: list[Begun] = []
    events = [asyncio.Event() for _ in range(count)]
    for i, event in enumerate(events):
        prompt = prompt_of(9 + i, i)
        asked = respond(engine, prompt, experts=True, begun=event, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
        found.append((prompt, asyncio.create_task(asked)))
    await asyncio.gather(*(event.wait() for event in events))
    return found


async def test_a_server_without_room_computes_responses_again_and_their_routing_fits(
    engine: SglangEngine, model: torch.nn.Module
) -> None:
    await engine.load_weights(0, published_weights(model))
    begun = await begin(engine, REQUESTS)
    responses = await asyncio.gather(*(task for _, task in begun))
    assert max(response.result.retractions for response in responses) > 0
    for (prompt, _), response in zip(begun, responses, strict=True):
        assert response.result.reason is FinishReason.LENGTH
        np.testing.assert_array_equal(experts_of(response), reference_experts(model, [*prompt, *response.tokens]))


@pytest.mark.parametrize("pauses", [[PauseMode.RETRACT], [PauseMode.IN_PLACE, PauseMode.RETRACT]])
async def test_tokens_from_before_an_update_keep_the_routing_that_they_were_sampled_with(
    engine: SglangEngine, model: torch.nn.Module, newer: torch.nn.Module, pauses: list[PauseMode]
) -> None:
    version = (engine.version or 0) + 1
    await engine.load_weights(version, published_weights(model))
    begun = await begin(engine, 2)
    for mode in pauses:
        await engine.pause(mode)
    await engine.load_weights(version + 1, published_weights(newer))
    await engine.resume()
    for prompt, task in begun:
        response = await task
        old, new = response.result.weight_versions
        assert (old, new) == (VersionSpan(version, 0, old.end), VersionSpan(version + 1, old.end, LENGTH))
        assert (response.result.reason, len(response.tokens)) == (FinishReason.LENGTH, LENGTH)
        ids = [*prompt, *response.tokens]
        known = len(prompt) + old.end - 1  # rows that were computed before the update
        before, after = reference_experts(model, ids), reference_experts(newer, ids)
        assert (before[:known] != after[:known]).any(axis=(1, 2)).mean() > 0.5
        np.testing.assert_array_equal(experts_of(response)[:known], before[:known])
        np.testing.assert_array_equal(experts_of(response)[known:], after[known:])
        for weights, span in ((model, old), (newer, new)):
            expected = reference_log_probs(weights, prompt, response.tokens)[span.start : span.end]
            found = torch.tensor(response.log_probs[span.start : span.end], dtype=torch.float64)
            # What could not be sampled, the end token, takes no part in the server's log-probabilities.
            assert float((found - expected).abs().max()) < 0.1


async def test_what_is_computed_again_with_other_weights_is_given_up(
    engine: SglangEngine, model: torch.nn.Module, newer: torch.nn.Module
) -> None:
    """An update in place keeps requests on the server, which then runs out of room and overwrites their routing."""
    version = (engine.version or 0) + 1
    await engine.load_weights(version, published_weights(model))
    begun = await begin(engine, REQUESTS)
    await engine.load_weights(version + 1, published_weights(newer))
    lost = 0
    for prompt, task in begun:
        response = await task
        first = response.result.weight_versions[0]
        if first.version == version and response.result.retractions:
            assert (response.result.reason, response.result.routed_experts) == (FinishReason.ABORT, None)
            lost += 1
            continue
        assert response.result.reason is FinishReason.LENGTH
        weights = model if first.version == version else newer
        known = len(prompt) + first.end - 1
        expected = reference_experts(weights, [*prompt, *response.tokens])
        np.testing.assert_array_equal(experts_of(response)[:known], expected[:known])
    assert lost > 0
