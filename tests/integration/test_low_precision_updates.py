"""Weights that leave the trainer quantised: what the torch engine gets, computes with and gives account of."""

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

from miles.precision.layers import QuantisedLayers
from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors, restored
from miles.services.rollout.engines.checkpoint_weights import read_weights
from miles.weights import WeightSubscriber
from miles.weights.export_format import formatted
from miles.weights.manifest import ChecksumMismatch

FP8 = Recipe(format="fp8_block")
RECIPES = [FP8, Recipe(format="int4", group_size=32), Recipe(format="mxfp8"), Recipe(format="nvfp4")]


@pytest.fixture
async def host(tmp_path: pathlib.Path) -> AsyncIterator[Host]:
    made = Host(tmp_path, disk_dir=tmp_path / "shared")
    await made.start()
    yield made
    await made.close()


def stands_for(recipe: Recipe, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights after they were quantised and dequantised."""
    sent = dict(formatted(QuantisedTensors(recipe), weights.items()))
    return restored(recipe, {name: tuple(t.shape) for name, t in weights.items()}, sent, torch.bfloat16)


@pytest.mark.parametrize(
    ("family", "recipe"),
    list(zip(["qwen3", "qwen3_moe"] * 2, RECIPES, strict=True)),
    ids=lambda each: each.format if isinstance(each, Recipe) else each,
)
async def test_an_engine_computes_with_what_its_quantised_weights_stand_for(
    host: Host, tmp_path: pathlib.Path, family: str, recipe: Recipe
) -> None:
    weights = weights_of(save_checkpoint(tmp_path / "model", family), torch.bfloat16)
    sent = dict(formatted(QuantisedTensors(recipe), weights.items()))
    assert sum(t.nbytes for t in sent.values()) < 0.85 * sum(t.nbytes for t in weights.values())
    prompt = [1, 2, 3]
    async with running_engine(tmp_path / "model", None, dtype="bfloat16", recipe=recipe) as engine:
        subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine)
        await subscriber.start()
        for version, transport in enumerate(["UNSPECIFIED", "GRPC_CHUNKS", "DISK_DELTA"]):
            await host.publish(version, sent, transport)
            await host.activate(version, check_equal=True)
            assert raw(await engine.weight_bytes()) == raw(sent)
        answer = await respond(engine, prompt, seed=3)
        await subscriber.close()
    plain = stands_for(recipe, weights)
    assert any(not torch.equal(plain[name], weights[name]) for name in weights)
    async with running_engine(tmp_path / "model", plain, dtype="bfloat16") as engine:
        expected = await respond(engine, prompt, seed=3)
    assert (answer.log_probs == expected.log_probs) is not recipe.rounds_inputs


async def test_a_served_weight_that_its_parts_do_not_stand_for_is_named(tmp_path: pathlib.Path) -> None:
    weights = weights_of(save_checkpoint(tmp_path / "model", "llama"), torch.bfloat16)
    sent = dict(formatted(QuantisedTensors(FP8), weights.items()))
    async with running_engine(tmp_path / "model", sent, dtype="bfloat16", recipe=FP8) as engine:
        name = "model.layers.0.self_attn.q_proj.weight"
        served = await engine._call(lambda: engine._started().generator.parameters.served, "reading")
        served[name][0, 0] += 1
        with pytest.raises(ChecksumMismatch, match=name):
            await engine.weight_bytes()
        with pytest.raises(ValueError, match=f"{name} is missing"):
            await engine.load_weights(1, {n: t for n, t in sent.items() if n != name})
        with pytest.raises(ValueError, match=f"{name} is torch.bfloat16"):
            await engine.load_weights(1, weights)


@pytest.mark.parametrize(("family", "name"), [("dense", "fp8_block"), ("moe", "int4")])
async def test_a_trainer_sends_quantised_weights_when_asked_to(
    host: Host, tmp_path: pathlib.Path, redis_url: str, family: str, name: str
) -> None:
    model = (write_dense_model if family == "dense" else write_moe_model)(tmp_path / "model")
    settings = {"fp8_block": {}, "int4": {"int4_group_size": 8, "int4_layers": ["."]}}[name]
    config = job_config(
        model,
        rollout_weight_format=name,
        extra_high_precision_layers_hf=["o_proj"],
        rollout_dtype="bfloat16",
        **settings,
    )
    recipe = Recipe(format=name, layers=QuantisedLayers(but=("o_proj",)), group_size=8)
    trainer = await asyncio.to_thread(TrainerProcess)
    try:
        await asyncio.to_thread(trainer.start_job, JOB, config, redis_url, host.address, tmp_path / "run")
        async with running_engine(model, None, dtype="bfloat16", recipe=recipe) as engine:
            subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine)
            await subscriber.start()
            await asyncio.to_thread(trainer.export, JOB, 0)
            await host.activate(0, check_equal=True)
            held = await engine.weight_bytes()
            await subscriber.close()
    finally:
        trainer.kill()
    expected = formatted(QuantisedTensors(recipe), read_weights(str(model), "bfloat16").items())
    assert raw(held) == raw(dict(expected))
    suffix = {"fp8_block": "_scale_inv", "int4": "_packed"}[name]
    scaled = {part.split(".")[-2] for part in held if part.endswith(f"weight{suffix}")}
    assert scaled == {"q_proj", "k_proj", "v_proj"} | (
        {"gate_proj", "up_proj", "down_proj"} if family == "dense" else set()
    )
    assert (f"model.layers.0.mlp.experts.gate_up_proj{suffix}" in held) is (family == "moe")
