"""SGLang servers on a GPU: log-probabilities, weights by handles of GPU memory, pauses, and memory given back."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch
from sglang_kit import largest_difference, options, reference_log_probs, respond, running
from torch_engine_models import prompt_of, save_checkpoint, weights_of

from miles.services.rollout.engine import PauseMode
from miles.services.rollout.engines.sglang import SglangEngine

pytest.importorskip("sglang")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.asyncio(loop_scope="module"),
]
TOLERANCE = 0.05
"""In nats: attention and experts round to tf32 there; other weights differ by whole nats."""
LONG = {"max_new_tokens": 300, "min_new_tokens": 300}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[torch.nn.Module]:
    """Two models of one architecture with other weights; the first one's checkpoint is served."""
    folder = tmp_path_factory.mktemp("sglang")
    made = [save_checkpoint(folder / name, "qwen3_moe", seed) for seed, name in enumerate(("a", "b"))]
    for model in made:
        model.folder = folder / "a"
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    models: list[torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SglangEngine]:
    folder: pathlib.Path = models[0].folder  # type: ignore[assignment]
    given = options(folder, tmp_path_factory.mktemp("logs"), memory_saver=True, routed_experts=True)
    async with running(given) as started:
        yield started


def on_gpu(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights in one allocation, as a transport leaves them on the engine's GPU."""
    tensors = weights_of(model)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).cuda()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


async def test_weights_in_gpu_memory_are_served(engine: SglangEngine, models: list[torch.nn.Module]) -> None:
    for version, model in enumerate(models, start=1):
        await engine.load_weights(version, on_gpu(model))
        await engine.weight_bytes()
        prompt = prompt_of(20, version)
        response = await respond(engine, prompt, temperature=0.7, experts=True)
        assert [span.version for span in response.result.weight_versions] == [version]
        assert largest_difference(response, reference_log_probs(model, prompt, response.tokens, 0.7)) < TOLERANCE
        assert response.result.routed_experts is not None
        assert response.result.routed_experts.shape == (len(prompt) + len(response.tokens) - 1, 2, 2)


async def test_weights_in_host_memory_and_apart_on_the_gpu_are_served(
    engine: SglangEngine, models: list[torch.nn.Module]
) -> None:
    apart = {name: tensor.cuda() for name, tensor in weights_of(models[0]).items()}
    for version, tensors in ((3, weights_of(models[0])), (4, weights_of(models[1])), (5, apart)):
        await engine.load_weights(version, tensors)
        await engine.weight_bytes()
    response = await respond(engine, prompt_of(9))
    assert largest_difference(response, reference_log_probs(models[0], prompt_of(9), response.tokens)) < TOLERANCE


@pytest.mark.parametrize("mode", list(PauseMode))
async def test_an_update_under_load(engine: SglangEngine, models: list[torch.nn.Module], mode: PauseMode) -> None:
    version = engine.version
    assert version is not None
    tasks = [asyncio.create_task(respond(engine, prompt_of(20 + i, i), **LONG)) for i in range(12)]
    while engine.stats().running_requests < 12:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    await engine.pause(mode)
    await engine.load_weights(version + 1, on_gpu(models[(version + 1) % 2]))
    await engine.resume()
    for response in await asyncio.gather(*tasks):
        if mode is not PauseMode.ABORT:
            assert len(response.tokens) == 300
        spans = response.result.weight_versions
        assert not spans or spans[-1].end == len(response.tokens)


async def test_memory_is_given_back_and_taken_again(engine: SglangEngine, models: list[torch.nn.Module]) -> None:
    torch.cuda.synchronize()
    held, _ = torch.cuda.mem_get_info()
    await engine.release_memory()
    free, _ = torch.cuda.mem_get_info()
    assert free > held + (8 << 20)
    version = engine.version
    assert version is not None
    await engine.load_weights(version + 1, on_gpu(models[0]))
    response = await respond(engine, prompt_of(12))
    assert largest_difference(response, reference_log_probs(models[0], prompt_of(12), response.tokens)) < TOLERANCE
    await engine.release_memory()
    again = await respond(engine, prompt_of(12))  # a request takes the memory back by itself
    assert largest_difference(again, reference_log_probs(models[0], prompt_of(12), again.tokens)) < TOLERANCE
