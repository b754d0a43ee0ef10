"""Every trainer backend with every engine, family and transport: the engine has the trainer's bytes and its answers.

A real trainer publishes through the real weightsync service, once before and once after it has trained; a real engine
loads both versions and proves that it holds the second. `make conformance` goes through all combinations; a diagonal of
them, which has each backend with each engine and each transport, is among the tests of the engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pathlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import pytest
import pytest_asyncio
import sglang_kit
import torch
from conformance import (
    RESPONSE_TOKENS,
    TRANSPORTS,
    Combination,
    TrainedJob,
    answered_groups,
    answers,
    first_groups,
    greedy_tokens,
    stored,
)
from megatron_kit import cpu_environment, needs_megatron
from megatron_models import write_model
from torch_engine_models import running_engine
from trainer_process import TrainerProcess
from weightsync_processes import Service

from miles.rpc.gen import policy_pb2
from miles.services.rollout.engines.base import RolloutEngine
from miles.weights import WeightSubscriber
from miles.weights.naming.model_tensors import read_model_tensors

FAMILIES = ("Qwen3", "Qwen3-MoE", "MiniMax-M2", "DeepSeek-V3", "DeepSeek-V3, MTP", "GLM-4.5", "GLM-4.5, MTP")
FURTHER = {
    "torch": ("Llama", "Qwen2, Qwen2.5", "Qwen2-MoE", "GLM-4.7-Flash"),
    "sglang": ("Llama", "Qwen2, Qwen2.5", "GLM-4.7-Flash", "Gemma 3"),
}
"""By engine, families that go through one transport only. SGLang's attention for CPUs has no soft caps (Gemma 2)."""
BACKENDS = ("fsdp", "megatron")
ENGINES = ("torch", "sglang")
COMBINATIONS = [
    Combination(backend, engine, family, transport)
    for engine, family, backend, transport in itertools.product(ENGINES, FAMILIES, BACKENDS, TRANSPORTS)
    if (engine, family) != ("sglang", "MiniMax-M2")  # its norms of queries and keys are kernels for GPUs
]
COMBINATIONS += [
    Combination(backend, engine, family, "shared_memory")
    for engine, families in FURTHER.items()
    for family, backend in itertools.product(families, BACKENDS)
    if (backend, family) != ("megatron", "Qwen2-MoE")
]
DIAGONAL = {
    Combination("fsdp", "torch", "Qwen3", "disk_delta"),
    Combination("fsdp", "torch", "GLM-4.5", "broadcast"),
    Combination("megatron", "torch", "GLM-4.5, MTP", "disk_delta"),
    Combination("fsdp", "sglang", "Qwen3-MoE", "shared_memory"),
    Combination("megatron", "sglang", "DeepSeek-V3, MTP", "broadcast"),
}

pytestmark = [
    pytest.mark.conformance,
    pytest.mark.timeout(2700),
    pytest.mark.asyncio(loop_scope="module"),
]


def parameters(row: Combination) -> Any:
    """The engine of a combination and itself."""
    marks = [pytest.mark.engine] if row in DIAGONAL else []
    if row.backend == "megatron":
        marks.append(needs_megatron)
    return pytest.param((row.engine, row.family), row, marks=marks, id=str(row))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("conformance")


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> Callable[[str], pathlib.Path]:
    """The folder of a family's model, written when it is first asked for."""

    def written(family: str) -> pathlib.Path:
        path = folder / family.replace(", ", "-")
        return path if path.exists() else write_model(family, path)

    return written


@pytest.fixture(scope="module")
def weightsync(folder: pathlib.Path) -> Iterator[Service]:
    (folder / "shared").mkdir()
    service = Service(None, folder / "shared", options=["--disk-dir", str(folder / "disk")])
    yield service
    service.kill()


@pytest.fixture(scope="module")
def trainer() -> Iterator[Callable[[str], TrainerProcess]]:
    """The trainer of a backend, started when it is first asked for: one rank of fsdp, two of megatron."""
    started: dict[str, TrainerProcess] = {}

    def running(backend: str) -> TrainerProcess:
        if backend not in started:
            on_two = backend == "megatron"
            started[backend] = TrainerProcess(2, cpu_environment()) if on_two else TrainerProcess()
        return started[backend]

    yield running
    for process in started.values():
        process.kill()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    request: pytest.FixtureRequest, folder: pathlib.Path, model: Callable[[str], pathlib.Path]
) -> AsyncIterator[RolloutEngine]:
    """An engine on a family's model that has no weights yet; all trainers and transports use it in turn."""
    kind, family = request.param
    if kind == "torch":
        async with running_engine(model(family), None) as started:
            yield started
    elif sglang_kit.ON_GPU or not sglang_kit.have_sglang():
        pytest.skip("needs SGLang for the CPU: make test-engines")
    else:
        given = sglang_kit.options(model(family), folder / "logs" / family, weight_path="distributed")
        async with sglang_kit.running(given) as started:
            yield started


@contextlib.asynccontextmanager
async def following(engine: RolloutEngine, job_id: str, weightsync: Service) -> AsyncIterator[None]:
    """Keep the engine at the job's versions."""
    subscriber = WeightSubscriber(
        *(weightsync.address, job_id, "rollout-0", policy_pb2.WEIGHT_STREAM_POLICY, engine),
        create_receiver=engine.create_receiver,
    )
    await subscriber.start()
    try:
        yield
    finally:
        await subscriber.close()


@pytest.mark.parametrize(("engine", "row"), [parameters(row) for row in COMBINATIONS], indirect=["engine"])
async def test_an_engine_has_the_bytes_and_the_answers_of_the_trainer(
    engine: RolloutEngine,
    row: Combination,
    folder: pathlib.Path,
    model: Callable[[str], pathlib.Path],
    trainer: Callable[[str], TrainerProcess],
    weightsync: Service,
    job_id: str,
    redis_url: str,
    tmp_path: pathlib.Path,
) -> None:
    config = row.config(model(row.family), tmp_path / "run", folder / "disk")
    job = TrainedJob(trainer(row.backend), job_id, config, redis_url)
    async with job.held(weightsync.address), following(engine, job_id, weightsync):
        await job.export(0)
        await activate(weightsync, job_id, 0, check_equal=False)
        await job.train(0, first_groups(job_id))
        await job.export(1)
        await activate(weightsync, job_id, 1, check_equal=True)
        saved = await job.save_hf()
        check_bytes(model(row.family), saved, await engine.weight_bytes())

        greedy, drawn = await answers(engine, 0.0), await answers(engine, 1.0)
        assert [response.tokens for response in greedy] == greedy_tokens(saved, greedy)
        assert max(len(response.tokens) for response in greedy) == RESPONSE_TOKENS
        assert {span.version for response in greedy for span in response.result.weight_versions} == {1}
        await job.train(1, answered_groups(job_id, greedy, drawn))
        assert job.largest_difference(1) <= 1e-5


async def activate(weightsync: Service, job_id: str, version: int, *, check_equal: bool) -> None:
    """Have the engine serve a version, and with `check_equal` prove that it does."""
    done = await asyncio.to_thread(
        weightsync.activate, version, 1, deadline_s=150.0, check_equal=check_equal, job=job_id
    )
    assert (done.engines, done.quarantined) == (1, 0)


def check_bytes(untrained: pathlib.Path, saved: pathlib.Path, served: Mapping[str, torch.Tensor]) -> None:
    """The engine holds what the trainer saved, all of it but MTP layers, and not what it started from."""
    before, after = stored(untrained), stored(saved)
    held = dict(read_model_tensors(untrained).conversion.to_checkpoint(served.items()))
    assert all(torch.equal(tensor, after[name]) for name, tensor in held.items())
    left_out = after.keys() - held.keys()
    assert all(layer_of(name) > max(map(layer_of, held)) for name in left_out)
    trained = [name for name in held if not name.endswith("e_score_correction_bias")]
    assert not any(torch.equal(before[name], after[name]) for name in trained)


def layer_of(name: str) -> int:
    """Number of a tensor's layer; -1 outside of layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1
