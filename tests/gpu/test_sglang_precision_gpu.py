"""SGLang servers of FP8 and INT4 weights on a GPU: log-probabilities, updates by each path, checks, released memory.

    python -m pytest -m gpu tests/gpu/test_sglang_precision_gpu.py

Starts a server per format at once, which takes about 100 s where nothing is compiled yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from broadcast_kit import publish, transport
from rounded_reference import quantised
from sglang_kit import DTYPE, GPU_FLAGS, Response, options, published_weights, reference_log_probs, respond, running
from torch_engine_models import prompt_of, save_checkpoint
from weight_host import JOB, POLICY, Host

from miles.precision.layers import QuantisedLayers
from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors
from miles.rpc.gen import weightsync_pb2
from miles.services.rollout.engines.base import PauseMode
from miles.services.rollout.engines.sglang import SglangEngine
from miles.services.rollout.engines.sglang.server.served_model import served_quantisation, write_folder
from miles.services.trainer.backends.fsdp.replay.router import RoutingReplay
from miles.weights import WeightSubscriber
from miles.weights.base import Endpoint, WeightsRefused
from miles.weights.check import check_weight_update_equal
from miles.weights.transports.collective.group import Timing

pytest.importorskip("sglang")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.asyncio(loop_scope="module"),
]
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "initializer_range": 0.05,
}
RECIPES = {
    "fp8_block": Recipe(format="fp8_block"),
    "int4": Recipe(format="int4", layers=QuantisedLayers(only=(".experts.",))),
}
FLAGS = GPU_FLAGS | {"fp8_gemm_backend": "triton"}
"""DeepGEMM would compile each of its kernels first, for minutes."""
LONG = {"max_new_tokens": 300, "min_new_tokens": 300}


@dataclasses.dataclass(frozen=True)
class Policy:
    """A mixture of experts whose weights bfloat16 holds exactly."""

    folder: pathlib.Path
    model: torch.nn.Module
    replay: RoutingReplay
    recipe: Recipe

    def plain(self) -> dict[str, torch.Tensor]:
        return published_weights(self.model)

    def parts(self) -> dict[str, torch.Tensor]:
        """As a trainer publishes them."""
        published = QuantisedTensors(self.recipe)
        return {part: t for name, whole in self.plain().items() for part, t in published.convert(name, whole)}

    def log_probs(self, response: Response, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """By the recipe, and with weights and inputs that are not rounded; with the engine's choice of experts."""
        experts_TLK = response.result.routed_experts
        assert experts_TLK is not None
        all_TLK = np.concatenate([experts_TLK, experts_TLK[-1:]])  # the last token has none, and predicts nothing
        self.replay.replay(torch.from_numpy(all_TLK.astype(np.int64)))
        plain = reference_log_probs(self.model, prompt, response.tokens)
        with quantised(self.model, self.recipe, DTYPE):
            return reference_log_probs(self.model, prompt, response.tokens), plain


@pytest.fixture(params=list(RECIPES))
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return RECIPES[request.param]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Policy]:
    """Two of one architecture with other weights."""
    folder = tmp_path_factory.mktemp("sglang")
    made = []
    for seed in range(2):
        model = save_checkpoint(folder / str(seed), "qwen3_moe", seed, **SIZES)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(DTYPE))
        made.append(Policy(folder / str(seed), model, RoutingReplay(model), RECIPES["fp8_block"]))
    return made


@pytest.fixture
def policies(models: list[Policy], recipe: Recipe) -> list[Policy]:
    return [dataclasses.replace(policy, recipe=recipe) for policy in models]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(
    models: list[Policy], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mapping[str, SglangEngine | BaseException]]:
    """Started at once: FP8 on a folder in bfloat16, INT4 on one of INT4, and bfloat16 on one of FP8."""
    folder, logs = models[0].folder, tmp_path_factory.mktemp("logs")
    shapes = {name: tuple(tensor.shape) for name, tensor in models[0].plain().items()}
    stated = {name: folder.with_name(name) for name in RECIPES}
    for name, written in stated.items():
        write_folder(written, str(folder), served_quantisation(RECIPES[name], shapes))
    chosen: dict[str, tuple[pathlib.Path, Recipe | None]] = {
        "fp8_block": (folder, RECIPES["fp8_block"]),
        "int4": (stated["int4"], RECIPES["int4"]),
        "as_trained": (stated["fp8_block"], None),
    }
    started = {
        name: SglangEngine(
            options(where, logs, name=name, recipe=served, memory_saver=True, routed_experts=True, server_flags=FLAGS)
        )
        for name, (where, served) in chosen.items()
    }
    outcomes = await asyncio.gather(*(engine.start() for engine in started.values()), return_exceptions=True)
    yield {
        name: engine if outcome is None else outcome
        for (name, engine), outcome in zip(started.items(), outcomes, strict=True)
    }
    await asyncio.gather(*(engine.close() for engine in started.values()))


def started(engines: Mapping[str, SglangEngine | BaseException], name: str) -> SglangEngine:
    """The engine, unless it could not be started."""
    engine = engines[name]
    if isinstance(engine, BaseException):
        raise engine
    return engine


@pytest.fixture
def engine(engines: Mapping[str, SglangEngine | BaseException], recipe: Recipe) -> SglangEngine:
    return started(engines, recipe.format)


def together(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors in one allocation, as a transport leaves them on the engine's GPU."""
    starts = np.cumsum([0, *(-(-tensor.nbytes // 64) * 64 for tensor in tensors.values())])
    flat = torch.zeros(int(starts[-1]), dtype=torch.uint8, device="cuda")
    placed = {}
    for (name, tensor), start in zip(tensors.items(), starts, strict=False):
        placed[name] = flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        placed[name].copy_(tensor)
    return placed


async def served_is(engine: SglangEngine, policy: Policy, version: int) -> None:
    """Check that log-probabilities are those of the recipe, and much nearer to them than to plain ones."""
    apart, effect = [], []
    for seed in range(4):
        prompt = prompt_of(20, seed)
        response = await respond(engine, prompt, experts=True, max_new_tokens=40, min_new_tokens=40)
        assert [span.version for span in response.result.weight_versions] == [version]
        wanted, plain = policy.log_probs(response, prompt)
        served = torch.tensor(response.log_probs, dtype=torch.float64)
        possible = wanted.isfinite()  # an end token is ruled out before min_new_tokens
        apart.append((served - wanted)[possible].abs())
        effect.append((plain - wanted)[possible].abs())
    mean, scale = float(torch.cat(apart).mean()), float(torch.cat(effect).mean())
    largest = float(torch.cat(apart).max())
    print(f"{policy.recipe.format} version {version}: {mean=:.5f} {largest=:.4f}, quantisation itself {scale:.5f}")
    assert mean < 0.6 * scale
    assert largest < 0.3


async def next_version(engine: SglangEngine, tensors: Mapping[str, torch.Tensor]) -> int:
    version = (engine.version or 0) + 1
    await engine.load_weights(version, tensors)
    return version


async def test_weights_in_memory_of_the_gpu_and_of_the_host_are_served(
    engine: SglangEngine, policies: list[Policy]
) -> None:
    plain, parts = policies[0].plain(), policies[0].parts()
    assert sum(t.nbytes for t in parts.values()) < 0.6 * sum(t.nbytes for t in plain.values())
    for place in (together, dict):
        for policy in policies:
            version = await next_version(engine, place(policy.parts()))
            await served_is(engine, policy, version)
            await engine.weight_bytes()


async def test_weights_that_are_not_quantised_are_refused(engine: SglangEngine, policies: list[Policy]) -> None:
    with pytest.raises(WeightsRefused, match=f"quantised to {policies[0].recipe.format}"):
        await engine.load_weights(99, policies[0].plain())


@pytest.mark.parametrize("mode", list(PauseMode))
async def test_an_update_under_load(engine: SglangEngine, policies: list[Policy], mode: PauseMode) -> None:
    version = await next_version(engine, together(policies[0].parts()))
    tasks = [asyncio.create_task(respond(engine, prompt_of(20 + i, i), **LONG)) for i in range(12)]
    while engine.stats().running_requests < 12:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    await engine.pause(mode)
    await engine.load_weights(version + 1, together(policies[1].parts()))
    await engine.resume()
    for response in await asyncio.gather(*tasks):
        spans = response.result.weight_versions
        assert not spans or spans[-1].end == len(response.tokens)
    await served_is(engine, policies[1], version + 1)


async def test_graphs_compute_rightly_after_many_updates(engine: SglangEngine, policies: list[Policy]) -> None:
    for i in range(8):
        await next_version(engine, together(policies[i % 2].parts()))
        await asyncio.gather(*(respond(engine, prompt_of(20, seed), max_new_tokens=20) for seed in range(12)))
    assert engine.version is not None
    await served_is(engine, policies[1], engine.version)


@pytest.mark.parametrize("kind", ["UNSPECIFIED", "GRPC_CHUNKS", "DISK_DELTA"])
async def test_transports_of_a_host_end_in_checked_weights(
    engine: SglangEngine, policies: list[Policy], tmp_path: pathlib.Path, kind: str
) -> None:
    host = Host(tmp_path, disk_dir=tmp_path / "shared")
    await host.start()
    async with contextlib.AsyncExitStack() as undo:
        undo.push_async_callback(host.close)
        subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine)
        await subscriber.start()
        undo.push_async_callback(subscriber.close)
        for policy in policies:
            version = (engine.version or 0) + 1
            await host.publish(version, policy.parts(), kind)
            await host.activate(version, check_equal=True)
            await served_is(engine, policy, version)


async def test_files_are_loaded_into_a_server_that_runs_already(
    engine: SglangEngine, policies: list[Policy], recipe: Recipe, tmp_path: pathlib.Path
) -> None:
    address = engine.replicas[0].api.address
    given = options(
        *(policies[0].folder, tmp_path),
        addresses=(address,), recipe=recipe, weight_path="disk", weight_dir=tmp_path, name="other", routed_experts=True,
    )  # fmt: skip
    async with running(given) as attached:
        for version, policy in enumerate(policies, start=500):
            await attached.load_weights(version, policy.parts())
            await served_is(attached, policy, version)
            await attached.weight_bytes()
    await next_version(engine, policies[0].parts())


async def test_memory_that_was_released_comes_back_with_the_next_version(
    engine: SglangEngine, policies: list[Policy]
) -> None:
    for policy in policies:
        assert await engine.release_memory() > 8 << 20
        await served_is(engine, policy, await next_version(engine, together(policy.parts())))


async def test_a_folder_in_fp8_is_served_as_it_was_trained(
    engines: Mapping[str, SglangEngine | BaseException], models: list[Policy]
) -> None:
    plain, policy = started(engines, "as_trained"), models[0]
    await plain.load_weights(1, together(policy.plain()))
    response = await respond(plain, prompt_of(20), experts=True)
    _, wanted = policy.log_probs(response, prompt_of(20))
    assert float((torch.tensor(response.log_probs, dtype=torch.float64) - wanted).abs().max()) < 0.1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of both sides")
async def test_weights_come_by_nccl_straight_into_a_server(
    policies: list[Policy], recipe: Recipe, tmp_path: pathlib.Path
) -> None:
    given = options(
        *(policies[0].folder, tmp_path / "logs"),
        recipe=recipe, weight_path="distributed", name="nccl", routed_experts=True, server_flags=FLAGS,
    )  # fmt: skip
    rank = transport("cuda:1", Timing())
    async with running(given) as engine:
        receiver = engine.create_receiver(weightsync_pb2.TRANSPORT_KIND_COLLECTIVE, Endpoint(device=engine.device))
        for version, policy in enumerate(policies, start=1):
            on_gpu = {name: tensor.to("cuda:1") for name, tensor in policy.parts().items()}
            published = publish([rank], version, on_gpu, 1 << 16)
            received = await asyncio.to_thread(receiver.receive, *published)
            await engine.load_weights(version, received.tensors)
            await served_is(engine, policy, version)
            check_weight_update_equal(published[1], await engine.weight_bytes())
    rank.close()
