"""Weights that leave the trainer as FP8 blocks: what the torch engine gets, computes with and gives account of."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator

import pytest
import torch
from torch_engine_models import respond, running_engine, save_checkpoint, weights_of
from trainer_cases import job_config, write_dense_model, write_moe_model
from trainer_process import TrainerProcess
from weight_host import JOB, POLICY, Host, raw

from miles.services.rollout.engines.checkpoint_weights import read_weights
from miles.weights import WeightSubscriber
from miles.weights.export_format import formatted
from miles.weights.fp8 import Fp8Blocks, dequantise_weights
from miles.weights.manifest import ChecksumMismatch


@pytest.fixture
async def host(tmp_path: pathlib.Path) -> AsyncIterator[Host]:
    made = Host(tmp_path, disk_dir=tmp_path / "shared")
    await made.start()
    yield made
    await made.close()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
async def test_an_engine_computes_with_what_its_fp8_weights_stand_for(
    host: Host, tmp_path: pathlib.Path, family: str
) -> None:
    weights = weights_of(save_checkpoint(tmp_path / "model", family), torch.bfloat16)
    sent = dict(formatted(Fp8Blocks(), weights.items()))
    assert sum(t.nbytes for t in sent.values()) < 0.85 * sum(t.nbytes for t in weights.values())
    prompt = [1, 2, 3]
    async with running_engine(tmp_path / "model", None, dtype="bfloat16") as engine:
        subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine)
        await subscriber.start()
        for version, transport in enumerate(["UNSPECIFIED", "GRPC_CHUNKS", "DISK_DELTA"]):
            await host.publish(version, sent, transport)
            await host.activate(version, check_equal=True)
            assert raw(await engine.weight_bytes()) == raw(sent)
        answer = await respond(engine, prompt, seed=3)
        # Back to weights as they were trained.
        await host.publish(3, weights)
        await host.activate(3, check_equal=True)
        assert raw(await engine.weight_bytes()) == raw(weights)
        exact = await respond(engine, prompt, seed=3)
        await subscriber.close()
    async with running_engine(tmp_path / "model", dequantise_weights(sent, torch.bfloat16), dtype="bfloat16") as plain:
        expected = await respond(plain, prompt, seed=3)
    assert (answer.tokens, answer.log_probs) == (expected.tokens, expected.log_probs)
    assert answer.log_probs != exact.log_probs


async def test_a_served_weight_that_its_values_do_not_stand_for_is_named(tmp_path: pathlib.Path) -> None:
    weights = weights_of(save_checkpoint(tmp_path / "model", "llama"), torch.bfloat16)
    sent = dict(formatted(Fp8Blocks(), weights.items()))
    async with running_engine(tmp_path / "model", sent, dtype="bfloat16") as engine:
        name = "model.layers.0.self_attn.q_proj.weight"
        served = await engine._call(lambda: engine._started().generator.parameters.served, "reading")
        served[name][0, 0] += 1
        with pytest.raises(ChecksumMismatch, match=name):
            await engine.weight_bytes()
        with pytest.raises(ValueError, match="has no values"):
            await engine.load_weights(1, {n: t for n, t in sent.items() if n != name})


@pytest.mark.parametrize("family", ["dense", "moe"])
async def test_a_trainer_sends_fp8_when_asked_to(
    host: Host, tmp_path: pathlib.Path, redis_url: str, family: str
) -> None:
    model = (write_dense_model if family == "dense" else write_moe_model)(tmp_path / "model")
    config = job_config(
        model, rollout_weight_format="fp8_block", extra_high_precision_layers_hf=["o_proj"], rollout_dtype="bfloat16"
    )
    trainer = await asyncio.to_thread(TrainerProcess)
    try:
        await asyncio.to_thread(trainer.start_job, JOB, config, redis_url, host.address, tmp_path / "run")
        async with running_engine(model, None, dtype="bfloat16") as engine:
            subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine)
            await subscriber.start()
            await asyncio.to_thread(trainer.export, JOB, 0)
            await host.activate(0, check_equal=True)
            held = await engine.weight_bytes()
            await subscriber.close()
    finally:
        trainer.kill()
    expected = formatted(Fp8Blocks(["o_proj"]), read_weights(str(model), "bfloat16").items())
    assert raw(held) == raw(dict(expected))
    scaled = {name.split(".")[-2] for name in held if name.endswith("weight_scale_inv")}
    assert scaled == {"q_proj", "k_proj", "v_proj"} | (
        {"gate_proj", "up_proj", "down_proj"} if family == "dense" else set()
    )
    assert ("model.layers.0.mlp.experts.gate_up_proj_scale_inv" in held) is (family == "moe")
