"""SGLang servers on a GPU: log-probabilities, weights by GPU memory handles, pauses, and released memory."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch
from broadcast_kit import publish, transport
from sglang_kit import GPU_FLAGS, largest_difference, options, published_weights, reference_log_probs, respond, running
from torch_engine_models import prompt_of, save_checkpoint

from miles.rpc.gen import weightsync_pb2
from miles.services.rollout.engines.base import PauseMode
from miles.services.rollout.engines.sglang import SglangEngine
from miles.services.rollout.engines.sglang.weights.checker import checksum
from miles.weights.base import Endpoint
from miles.weights.check import check_weight_update_equal
from miles.weights.transports.collective.group import Timing

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
    tensors = published_weights(model)
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
    apart = {name: tensor.cuda() for name, tensor in published_weights(models[0]).items()}
    for version, tensors in ((3, published_weights(models[0])), (4, published_weights(models[1])), (5, apart)):
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


async def test_a_draft_is_swapped_under_load_and_the_policy_stays_as_it_is(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("draft")
    policy, other = (save_checkpoint(folder / str(seed), "qwen3", seed, initializer_range=0.1) for seed in (0, 1))
    flags = {
        **GPU_FLAGS,
        "speculative_algorithm": "STANDALONE",
        "speculative_draft_model_path": str(folder / "1"),
        "speculative_num_steps": 2,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 3,
    }
    async with running(options(folder / "0", folder / "logs", server_flags=flags)) as engine:
        await engine.load_weights(5, on_gpu(policy))
        draft = engine.draft
        assert draft is not None
        before = await checksum(engine.replicas[0].api, "target", 60.0)
        accepted = []
        for version, model in enumerate((other, policy), start=1):
            tasks = [asyncio.create_task(respond(engine, prompt_of(9 + i, i), **LONG)) for i in range(4)]
            await asyncio.sleep(0.2)
            await draft.load_weights(version, published_weights(model))
            assert (draft.version, engine.version) == (version, 5)
            await draft.weight_bytes()
            for response in await asyncio.gather(*tasks):
                assert [span.version for span in response.result.weight_versions] == [5]
                assert len(response.tokens) == 300
            greedy = await respond(engine, prompt_of(20), temperature=0.0, max_new_tokens=60, min_new_tokens=60)
            speculative = greedy.result.speculative
            assert speculative is not None
            accepted.append(speculative.accepted_draft_tokens / speculative.proposed_draft_tokens)
        assert accepted[1] > 0.9 > accepted[0], "a draft that is the policy proposes what the policy samples"
        assert await checksum(engine.replicas[0].api, "target", 60.0) == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of both sides")
async def test_weights_come_by_nccl_straight_into_a_server(
    models: list[torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder: pathlib.Path = models[0].folder  # type: ignore[assignment]
    given = options(folder, tmp_path_factory.mktemp("logs"), weight_path="distributed", name="nccl")
    rank = transport("cuda:1", Timing())
    async with running(given) as engine:
        receiver = engine.create_receiver(weightsync_pb2.TRANSPORT_KIND_COLLECTIVE, Endpoint(device=engine.device))
        for version, model in enumerate(models, start=1):
            tensors = {name: tensor.to("cuda:1") for name, tensor in published_weights(model).items()}
            published = publish([rank], version, tensors, 1 << 16)
            received = await asyncio.to_thread(receiver.receive, *published)
            await engine.load_weights(version, received.tensors)
            response = await respond(engine, prompt_of(14))
            assert [span.version for span in response.result.weight_versions] == [version]
            expected = reference_log_probs(model, prompt_of(14), response.tokens)
            assert largest_difference(response, expected) < TOLERANCE
            check_weight_update_equal(published[1], await engine.weight_bytes())
    rank.close()
