"""Weights between GPUs: memory shared within a node, NCCL between two GPUs.

    python -m pytest -m gpu tests/gpu/test_weights_gpu.py

Needs one GPU for cuda_ipc and two for NCCL.
"""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from broadcast_kit import random_tensors, read, transport
from gpu_publisher import weights
from torch_engine_models import prompt_of, respond, running_engine, save_checkpoint
from trainer_cases import write_dense_model, write_moe_model
from weightsync_processes import JOB, Lines, Service, digest

from miles.rpc.gen import policy_pb2, weightsource_pb2, weightsync_pb2
from miles.services.rollout.engines.base import PauseMode
from miles.services.rollout.serving.readiness import Serving
from miles.services.trainer.ranks.collective_calls import Command
from miles.services.trainer.ranks.worker import RankWorker
from miles.weights import WeightSubscriber
from miles.weights.base import Endpoint
from miles.weights.manifest import ManifestError, checksum
from miles.weights.transports.cuda_ipc.probe import open_probes, share_probe
from miles.weights.transports.cuda_ipc.transport import CudaIpcTransport

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of trainer and engine")
TESTS = pathlib.Path(__file__).parent.parent


@pytest.fixture
def start() -> Iterator[Callable[..., Lines]]:
    """Starts scripts of the tests that are killed in the end."""
    started: list[Lines] = []

    def one(script: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Lines:
        started.append(Lines([str(TESTS / script), *map(str, arguments)], environment=environment))
        return started[-1]

    yield one
    for process in started:
        process.kill()


@pytest.fixture
def weightsync(tmp_path: pathlib.Path) -> Iterator[Service]:
    (tmp_path / "shared").mkdir()
    service = Service(None, tmp_path / "shared")
    yield service
    service.kill()


def probe_of(engine: Lines) -> weightsource_pb2.GpuMemoryProbe:
    """What an engine's process shares."""
    return as_probe(engine.wait_for(lambda line: line.startswith("probe "), "a probe"))


def as_probe(line: str) -> weightsource_pb2.GpuMemoryProbe:
    """The probe in a line of an engine's process."""
    return weightsource_pb2.GpuMemoryProbe.FromString(bytes.fromhex(line.split()[1]))


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def test_shared_gpu_memory_holds_every_byte_and_outlives_the_trainer(
    tmp_path: pathlib.Path, start: Callable[..., Lines]
) -> None:
    trainer = start("support/broadcast_source.py", tmp_path, "--cuda-ipc", "--device", "cuda:0")
    engine = CudaIpcTransport(Endpoint(device=torch.device("cuda", 0)))
    kept = {}
    for version in range(1, 6):
        trainer.wait_for(lambda line, version=version: line == f"offering {version}", "an offer")
        kept[version] = engine.receive(*read(tmp_path))
        trainer.send("next")
    trainer.kill()
    for version, received in kept.items():
        assert all(tensor.device.type == "cuda" for tensor in received.tensors.values())
        assert digest(on_cpu(dict(received.tensors))) == digest(random_tensors(version))


def test_a_version_that_the_trainer_has_taken_back_is_refused(
    tmp_path: pathlib.Path, start: Callable[..., Lines]
) -> None:
    trainer = start("support/broadcast_source.py", tmp_path, "--cuda-ipc", "--device", "cuda:0")
    trainer.wait_for(lambda line: line == "offering 1", "an offer")
    published = read(tmp_path)
    trainer.kill()
    with pytest.raises(ManifestError):
        CudaIpcTransport(Endpoint(device=torch.device("cuda", 0))).receive(*published)


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=two_gpus)])
def test_a_trainer_reads_the_token_in_an_engines_gpu_memory(device: str, start: Callable[..., Lines]) -> None:
    engine = start("support/gpu_probe.py", device)
    probe = probe_of(engine)
    trainer = torch.device("cuda", 0)
    for _ in range(3):
        opened = open_probes([probe], trainer)
        assert list(opened.tokens) == [probe.token]
    assert opened.gpu_nbytes == torch.cuda.get_device_properties(trainer).total_memory
    command = Command("open_gpu_memory", payloads=(probe.SerializeToString(),))
    for rank in range(2):
        report = weightsource_pb2.OpenedGpuMemory.FromString(RankWorker(trainer, rank, 2).run(command))
        assert report == opened, "a rank of the trainer's job finds the same"
    stale = weightsource_pb2.GpuMemoryProbe.FromString(probe.SerializeToString())
    stale.token = bytes(16)
    assert not open_probes([stale], trainer).tokens, "the memory holds something else"
    engine.send("free")
    engine.wait_for(lambda line: line == "freed", "the end")
    engine.kill()
    assert not open_probes([probe], trainer).tokens, "nobody shares it any more"


def test_expandable_segments_are_not_taken_for_memory_that_can_be_shared(start: Callable[..., Lines]) -> None:
    engine = start(
        "support/gpu_probe.py", "cuda:0", environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    )
    line = engine.wait_for(lambda line: line == "cannot share" or line.startswith("probe "), "a probe, or why not")
    if line != "cannot share":
        assert not open_probes([as_probe(line)], torch.device("cuda", 0)).tokens


def test_what_an_engine_shares_is_freed_whether_somebody_has_opened_it_or_not() -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)
    for _ in range(1500):  # torch keeps count of shared memory in files of 10,000, and of events up to 1,000
        shared = share_probe(device)
        assert shared is not None
        shared.free()
        del shared
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated(device) == before


@two_gpus
def test_memory_of_another_gpu_of_the_node_is_copied_over(tmp_path: pathlib.Path, start: Callable[..., Lines]) -> None:
    trainer = start("support/broadcast_source.py", tmp_path, "--cuda-ipc", "--device", "cuda:1")
    trainer.wait_for(lambda line: line == "offering 1", "an offer")
    received = CudaIpcTransport(Endpoint(device=torch.device("cuda", 0))).receive(*read(tmp_path))
    assert digest(on_cpu(dict(received.tensors))) == digest(random_tensors(1))


@two_gpus
def test_nccl_brings_every_byte_of_every_version(tmp_path: pathlib.Path, start: Callable[..., Lines]) -> None:
    trainer = start("support/broadcast_source.py", tmp_path, "--device", "cuda:0")
    engine = transport("cuda:1")
    for version in range(1, 4):
        trainer.wait_for(lambda line, version=version: line == f"offering {version}", "an offer")
        received = engine.receive(*read(tmp_path))
        assert digest(on_cpu(dict(received.tensors))) == digest(random_tensors(version))
        trainer.send("next")
    engine.close()


@two_gpus
@pytest.mark.parametrize("ending", ["SIGKILL", "SIGSTOP"])
def test_an_engine_that_dies_or_hangs_in_nccl_leaves_the_trainer_able_to_serve_the_next(
    ending: str, tmp_path: pathlib.Path, start: Callable[..., Lines]
) -> None:
    trainer = start("support/broadcast_source.py", tmp_path, "--device", "cuda:0")
    trainer.wait_for(lambda line: line == "offering 1", "an offer")
    dying = start("support/broadcast_engine.py", tmp_path, "--device", "cuda:1", "--ending", ending)
    dying.wait_for(lambda line: line == "in the middle", "the middle of a broadcast")
    engine = transport("cuda:1")
    received = engine.receive(*read(tmp_path))
    assert digest(on_cpu(dict(received.tensors))) == digest(random_tensors(1))
    engine.close()


@two_gpus
def test_a_trainer_that_dies_in_nccl_fails_the_engine_in_time(
    tmp_path: pathlib.Path, start: Callable[..., Lines]
) -> None:
    trainer = start("support/broadcast_source.py", tmp_path, "--device", "cuda:0")
    trainer.wait_for(lambda line: line == "offering 1", "an offer")
    engine = start("support/broadcast_engine.py", tmp_path, "--device", "cuda:1", "--victim", trainer.process.pid)
    assert "ConnectionError" in engine.wait_for(lambda line: "Error" in line, "an error")


@two_gpus
@pytest.mark.parametrize(("family", "dtype"), [("dense", "bfloat16"), ("moe", "float32")])
def test_two_ranks_gather_every_byte_by_nccl(
    family: str, dtype: str, tmp_path: pathlib.Path, start: Callable[..., Lines]
) -> None:
    model = (write_moe_model if family == "moe" else write_dense_model)(tmp_path / "model")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ranks = Lines([*torchrun, str(TESTS / "support/gather_ranks.py"), str(model), dtype, "cuda"])
    for _ in range(2):
        ranks.wait_for(lambda line: line.endswith("has every byte"), "a rank's answer")
    assert ranks.process.wait(60) == 0


@pytest.mark.parametrize("mode", ["auto", "cuda_ipc", pytest.param("broadcast", marks=two_gpus)])
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("qwen3_moe", "bfloat16")])
async def test_the_torch_engine_serves_what_the_trainer_published(
    mode: str, family: str, dtype: str, tmp_path: pathlib.Path, weightsync: Service, start: Callable[..., Lines]
) -> None:
    save_checkpoint(tmp_path / "model", family)
    trainer = start(
        "support/gpu_publisher.py",
        *("--address", weightsync.address, "--mode", mode, "--family", family, "--dtype", dtype),
        *("--device", "cuda:0"),
    )
    await asyncio.to_thread(trainer.wait_for, lambda line: line == "ready", "the trainer")
    device = "cuda:1" if mode == "broadcast" else "cuda:0"
    async with running_engine(tmp_path / "model", None, device=device, dtype=dtype) as engine:
        serving = Serving(engine, lambda: None, update_mode=PauseMode.RETRACT)
        stream = policy_pb2.WEIGHT_STREAM_POLICY
        subscriber = WeightSubscriber(weightsync.address, JOB, "engine", stream, serving)
        await subscriber.start()
        for version in range(3):
            trainer.send(f"{version} {version}")
            told = f"published {version}"
            await asyncio.to_thread(trainer.wait_for, lambda line, told=told: line == told, told)
            await asyncio.to_thread(weightsync.wait_until, lambda state: len(state.engines) == 1, "the engine")
            done = await asyncio.to_thread(weightsync.activate, version, 1, check_equal=True)
            assert (done.engines, done.quarantined) == (1, 0)
            served = await engine.weight_bytes()
            expected = weights(family, version, getattr(torch, dtype))
            assert {name: checksum(_bytes(tensor)) for name, tensor in served.items()} == {
                name: checksum(_bytes(tensor)) for name, tensor in expected.items()
            }
        if mode != "broadcast":
            (status,) = (await asyncio.to_thread(weightsync.list)).engines
            assert status.transport == weightsync_pb2.TRANSPORT_KIND_CUDA_IPC, "also when nobody asks for it"
        response = await respond(engine, prompt_of(12), max_new_tokens=8, min_new_tokens=8)
        assert len(response.tokens) == 8
        await subscriber.close()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
