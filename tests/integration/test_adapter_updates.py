"""Versions that consist of an adapter: over every transport, into the torch engine, and from a trainer's ranks."""

from __future__ import annotations

import pathlib
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import sglang_kit
import torch
from torch_engine_models import prompt_of, respond, running_engine, save_checkpoint
from trainer_cases import job_config, random_groups, write_dense_model
from trainer_process import TrainerProcess
from weight_host import JOB, POLICY, Host, raw
from weightsync_processes import Engine, Lines, Service, digest

from miles.queue import GroupQueue, connect_async
from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.rollout.engines.checkpoint_weights import read_weights
from miles.weights import SubscriberState, WeightSubscriber
from miles.weights.adapters import lora, peft_folder
from miles.weights.adapters.merging import AdapterBase
from miles.weights.base import WeightsRefused

RANK = 4
Tensors = dict[str, torch.Tensor]


@pytest.fixture
async def host(tmp_path: pathlib.Path) -> AsyncIterator[Host]:
    """A service with storage."""
    made = Host(tmp_path, disk_dir=tmp_path / "shared")
    await made.start()
    yield made
    await made.close()


def adapter(base: Tensors, seed: int) -> Tensors:
    """A random adapter of every attention matrix."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in base.items():
        if "_proj" in name and "self_attn" in name and weight.dim() == 2:
            a_name, b_name = lora.adapter_names(name)
            tensors[a_name] = (0.1 * torch.randn(RANK, weight.shape[1], generator=generator)).to(weight.dtype)
            tensors[b_name] = (0.1 * torch.randn(weight.shape[0], RANK, generator=generator)).to(weight.dtype)
    return tensors


def described(base: Tensors, alpha: float = 8.0) -> policy_pb2.LoraAdapter:
    identity = lora.base_checksum(base.items(), next(iter(base.values())).dtype)
    return policy_pb2.LoraAdapter(rank=RANK, alpha=alpha, base_checksum=identity)


def merged(base: Tensors, tensors: Tensors, scale: float) -> Tensors:
    whole = dict(base)
    for name in lora.adapted_weights(tensors):
        a_RI, b_OR = (tensors[part] for part in lora.adapter_names(name))
        whole[name] = lora.merged(base[name], a_RI, b_OR, scale)
    return whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_an_engine_serves_base_and_adapter_by_whatever_way_it_comes(
    host: Host, tmp_path: pathlib.Path, dtype: str
) -> None:
    folder = tmp_path / "model"
    save_checkpoint(folder, "qwen3", num_hidden_layers=2, hidden_size=256)
    base = read_weights(str(folder), dtype)
    whole = await host.publish(0, base)
    async with running_engine(folder, None, dtype=dtype) as engine:
        subscriber = WeightSubscriber(
            host.address, JOB, "engine", POLICY, engine, base=AdapterBase(base, engine.device)
        )
        await subscriber.start()
        transports = ["UNSPECIFIED", "GRPC_CHUNKS", "DISK_DELTA", "DISK_DELTA", "SHARED_MEMORY"]
        for version, transport in enumerate(transports, start=1):
            tensors = adapter(base, version)
            result = await host.publish(version, tensors, transport, described(base))
            assert [tensor.name for tensor in result.manifest.tensors] == list(tensors)
            assert result.total_bytes < whole.total_bytes / 5
            await host.activate(version, check_equal=True)
            assert raw(await engine.weight_bytes()) == raw(merged(base, tensors, 8 / RANK)), transport
        # A full version may follow, and an adapter after it.
        await host.publish(6, base)
        await host.activate(6, check_equal=True)
        assert raw(await engine.weight_bytes()) == raw(base)
        await host.publish(7, tensors, lora=described(base))
        await host.activate(7, check_equal=True)
        late_answer = await respond(engine, [1, 2, 3], seed=5)
        await subscriber.close()
    async with running_engine(folder, merged(base, tensors, 8 / RANK), dtype=dtype) as plain:
        expected = await respond(plain, [1, 2, 3], seed=5)
    assert (late_answer.tokens, late_answer.log_probs) == (expected.tokens, expected.log_probs)


async def test_an_engine_that_comes_late_serves_base_and_adapter(host: Host, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    save_checkpoint(folder, "llama")
    base = read_weights(str(folder), "float32")
    for version in (1, 2, 3):
        await host.publish(version, tensors := adapter(base, version), lora=described(base))
        await host.activate(version, min_engines=0)
    async with running_engine(folder, None) as engine:
        subscriber = WeightSubscriber(host.address, JOB, "late", POLICY, engine, base=AdapterBase(base, engine.device))
        await subscriber.start()
        await subscriber.wait_for_version(3, 30)
        assert raw(await engine.weight_bytes()) == raw(merged(base, tensors, 8 / RANK))
        await subscriber.close()


@pytest.mark.parametrize("fault", ["other base", "no base"])
async def test_an_engine_without_the_trainers_base_never_serves(host: Host, tmp_path: pathlib.Path, fault: str) -> None:
    save_checkpoint(tmp_path / "model", "llama")
    save_checkpoint(tmp_path / "other", "llama", seed=1)
    base = read_weights(str(tmp_path / "model"), "float32")
    other = read_weights(str(tmp_path / "other"), "float32")
    async with running_engine(tmp_path / "model", None) as engine:
        wrong = AdapterBase(other, engine.device) if fault == "other base" else None
        subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine, base=wrong)
        await subscriber.start()
        await host.publish(1, adapter(base, 1), lora=described(base))
        words = "hf_checkpoint" if fault == "other base" else "no base to merge it into"
        with pytest.raises(WeightsRefused, match=f"no engine can take it; engine: prefetch of version 1: .*{words}"):
            await host.activate(1)
        assert subscriber.state is SubscriberState.QUARANTINED
        assert subscriber.refused
        [status] = (await host.list()).engines
        assert (status.state, status.refused) == (weightsync_pb2.ENGINE_STATE_QUARANTINED, True)
        assert engine.version is None
        await subscriber.close()


async def test_a_weight_that_is_not_what_base_and_adapter_give_is_found(host: Host, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    save_checkpoint(folder, "llama")
    base = read_weights(str(folder), "float32")
    async with running_engine(folder, None) as engine:
        subscriber = WeightSubscriber(
            host.address, JOB, "engine", POLICY, engine, base=AdapterBase(base, engine.device)
        )
        await subscriber.start()
        await host.publish(1, adapter(base, 1), lora=described(base))
        await host.activate(1, check_equal=True)
        (await engine.weight_bytes())["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
        answer = await host.check()
        assert (answer.equal, answer.quarantined) == (0, 1)
        assert "model.layers.0.self_attn.q_proj.weight has other bytes" in answer.engines[0].last_error
        assert subscriber.state is SubscriberState.QUARANTINED
        await subscriber.close()


@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sglang_kit.ON_GPU or not sglang_kit.have_sglang(), reason="needs SGLang for the CPU")
async def test_sglang_servers_serve_base_and_adapter(host: Host, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    model = save_checkpoint(folder, "qwen3", initializer_range=0.1)
    base = read_weights(str(folder), "float32")
    async with sglang_kit.running(sglang_kit.options(folder, tmp_path / "logs")) as engine:
        subscriber = WeightSubscriber(
            host.address, JOB, "engine", POLICY, engine, base=AdapterBase(base, engine.device)
        )
        await subscriber.start()
        for version in (1, 2):
            tensors = adapter(base, version)
            await host.publish(version, tensors, lora=described(base))
            await host.activate(version, deadline_s=60, check_equal=True)
            model.load_state_dict(merged(base, tensors, 8 / RANK), strict=False)
            response = await sglang_kit.respond(engine, prompt := prompt_of(9, version), max_new_tokens=20)
            expected = sglang_kit.reference_log_probs(model, prompt, response.tokens, 1.0)
            assert sglang_kit.largest_difference(response, expected) < 1e-5
        await subscriber.close()


@pytest.fixture
def weightsync(tmp_path: pathlib.Path) -> Iterator[Service]:
    (tmp_path / "versions").mkdir()
    (tmp_path / "disk").mkdir()
    service = Service(None, tmp_path / "versions", options=["--disk-dir", str(tmp_path / "disk")])
    yield service
    service.kill()


@pytest.fixture
def keep() -> Iterator[Callable[[Lines], None]]:
    """Has processes killed at the end of the test."""
    started: list[Lines] = []
    yield started.append
    for process in reversed(started):
        process.kill()


async def put_groups(redis_url: str, job_id: str, seed: int, group_ids: range) -> None:
    async with await connect_async(redis_url) as client:
        for group in random_groups(seed, group_ids):
            group.job_id = job_id
            await GroupQueue(client, job_id, consumer="test").put(group, attempt=0)


@pytest.mark.parametrize(
    ("ranks", "transport", "dtype"),
    [
        (1, "auto", "float32"),
        pytest.param(2, "broadcast", "bfloat16", marks=[pytest.mark.engine, pytest.mark.slow]),
        pytest.param(2, "grpc_chunks", "float32", marks=pytest.mark.engine),
    ],
)
async def test_what_a_trainer_learns_reaches_engines_as_an_adapter(
    ranks: int,
    transport: str,
    dtype: str,
    tmp_path: pathlib.Path,
    redis_url: str,
    job_id: str,
    weightsync: Service,
    keep: Callable[[Lines], None],
) -> None:
    model = write_dense_model(tmp_path / "model")
    config = job_config(
        model,
        lora_rank=RANK,
        train_dtype=dtype,
        rollout_dtype=dtype,
        actor_num_gpus_per_node=ranks,
        update_weight_transfer_mode=transport,
        update_weight_buffer_size=2048,
    )
    trainer = TrainerProcess(ranks)
    keep(trainer)
    engine = Engine(weightsync, "engine-0", "--base", str(model), dtype, job=job_id)
    keep(engine)
    await put_groups(redis_url, job_id, 3, range(4))
    trainer.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    exported = trainer.export(job_id, 0)
    weightsync.wait_until(lambda state: len(state.engines) == 1, "an engine")
    weightsync.activate(0, 1, job=job_id, check_equal=True)
    base = read_weights(str(model), dtype)
    assert exported.total_bytes < sum(tensor.nbytes for tensor in base.values()) / 2
    assert engine.digest() == digest(base)

    trainer.train(job_id, 0, [0, 1, 2, 3])
    assert trainer.export(job_id, 1).total_bytes == exported.total_bytes
    weightsync.activate(1, 1, job=job_id, check_equal=True)
    late = Engine(weightsync, "engine-1", "--base", str(model), dtype, job=job_id)
    keep(late)
    late.wait_for_state("serving", 1)
    folder = pathlib.Path(trainer.save(job_id, export_hf=True).hf_dir)
    saved = peft_folder.read(folder / "adapter")
    sent = {name: tensor.to(getattr(torch, dtype)) for name, tensor in saved.tensors.items()}
    expected = digest(merged(base, sent, saved.alpha / saved.rank))
    assert engine.digest() == late.digest() == expected != digest(base)
    assert digest(read_weights(str(folder), dtype)) == expected
