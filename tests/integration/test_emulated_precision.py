"""Emulated low precision in trainer and engine: the same log-probabilities, to the bit, and on several ranks."""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron_kit import run_cases
from safetensors.torch import load_file
from torch_engine_models import prompt_of, respond, running_engine, save_checkpoint
from trainer_cases import job_config, write_dense_model, write_moe_model

from miles.precision.of_run import rollout_recipe
from miles.precision.tensors import QuantisedTensors
from miles.services.rollout.engines.torch import TorchEngine
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan
from miles.weights.export_format import formatted

FORMATS: dict[str, dict[str, Any]] = {
    "fp8_block": {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
    "int4": {"int4_qat": True, "int4_group_size": 32, "int4_layers": ["."]},
    "mxfp8": {"fp8_format": "e4m3", "fp8_recipe": "mxfp8"},
    "nvfp4": {"fp4_format": "e2m1", "fp4_recipe": "nvfp4"},
}


@pytest.fixture
def ranks() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.use_deterministic_algorithms(False)


async def sample(engine: TorchEngine, version: int, *, routed: bool) -> list[SampleGroup]:
    """Four groups of four responses by the engine, all at once."""

    async def one(group: int, index: int) -> Sample:
        prompt = prompt_of(5 + 9 * group, seed=group)
        request = {"request_id": f"{group}-{index}", "seed": 100 * version + 10 * group + index, "routed": routed}
        tokens, log_probs, result = await respond(engine, prompt, **request)
        return Sample(
            group_id=group,
            index=index,
            prompt="p",
            tokens=np.array(prompt + tokens, dtype=np.int32),
            response_length=len(tokens),
            response="r",
            reward=float(index % 2),
            status=SampleStatus.COMPLETED,
            rollout_log_probs=np.array(log_probs, dtype=np.float32),
            rollout_routed_experts=result.routed_experts,
            weight_versions=(VersionSpan(version, 0, len(tokens)),),
        )

    numbers = [(group, index) for group in range(4) for index in range(4)]
    made = await asyncio.gather(*(one(group, index) for group, index in numbers))
    return [SampleGroup("job", group, list(made[4 * group : 4 * group + 4])) for group in range(4)]


async def differences(folder: pathlib.Path, dtype: str, settings: dict[str, Any], *, routed: bool) -> list[float]:
    """Of trainer and engine, over two steps; then the same for an engine whose inputs and weights are not rounded."""
    config = job_config(folder, **settings, train_dtype=dtype, rollout_dtype=dtype, use_rollout_routing_replay=routed)
    recipe = rollout_recipe(config)
    assert recipe is not None
    backend = FsdpBackend(config, folder.parent / "checkpoints", torch.device("cpu"))
    backend.load()

    def exported() -> dict[str, torch.Tensor]:
        return {name: tensor.detach().to(getattr(torch, dtype)).clone() for name, tensor in backend.export()}

    found = []
    async with running_engine(folder, None, dtype=dtype, recipe=recipe) as engine:
        for step in range(2):
            await engine.load_weights(step, dict(formatted(QuantisedTensors(recipe), exported().items())))
            groups = await sample(engine, step, routed=routed)
            metrics = backend.train(step, groups, lambda progress: None)
            found.append(metrics["train/train_rollout_logprob_abs_diff"])
    async with running_engine(folder, exported(), dtype=dtype) as engine:
        metrics = backend.train(2, await sample(engine, 2, routed=routed), lambda progress: None)
    backend.close()
    return [*found, metrics["train/train_rollout_logprob_abs_diff"]]


CASES = {("llama", "fp8_block"), ("llama", "nvfp4"), ("qwen3_moe", "fp8_block"), ("qwen3_moe", "int4")}
"""In float32; all others, and bfloat16, are slow."""


def cases() -> Iterator[Any]:
    for family in ("llama", "qwen3_moe"):
        for name in FORMATS:
            for dtype in ("float32", "bfloat16"):
                is_fast = dtype == "float32" and (family, name) in CASES
                yield pytest.param(family, name, dtype, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(("family", "name", "dtype"), cases())
async def test_the_trainer_has_the_engines_log_probs_to_the_bit(
    tmp_path: pathlib.Path, family: str, name: str, dtype: str
) -> None:
    save_checkpoint(tmp_path / "model", family)
    found = await differences(tmp_path / "model", dtype, FORMATS[name], routed=family == "qwen3_moe")
    assert found[:2] == [0.0, 0.0]
    assert found[2] > 1e-3


@pytest.mark.slow  # four processes that import transformers
def test_two_ranks_that_round_gathered_weights_train_as_one_that_rounds_its_own(tmp_path: pathlib.Path) -> None:
    models = {
        "dense": write_dense_model(tmp_path / "dense" / "model"),
        "moe": write_moe_model(tmp_path / "moe" / "model"),
    }
    settings = FORMATS | {"int4": FORMATS["int4"] | {"int4_group_size": 8}, "none": {}}
    # A step of Adam with a large epsilon is proportional to the gradient, so that weights after it show the gradient.
    step = {"adam_eps": 1.0, "lr": 1.0, "clip_grad": 0.0}
    runs = [
        {"name": f"{family}-{name}-{checkpointing}", "model": str(folder), "steps": 1,
         "flags": {**step, **chosen, "gradient_checkpointing": checkpointing}}
        for family, folder in models.items() for name, chosen in settings.items() for checkpointing in (False, True)
    ]  # fmt: skip
    weights: dict[str, list[dict[str, torch.Tensor]]] = {case["name"]: [] for case in runs}
    metrics: dict[str, list[dict[str, float]]] = {case["name"]: [] for case in runs}
    for ranks in (1, 2):
        (out := tmp_path / str(ranks)).mkdir()
        run_cases(runs, out, ranks=ranks, megatron=False)
        for name in weights:
            weights[name].append(load_file(out / f"{name}.safetensors"))
            metrics[name].append(json.loads((out / f"{name}.json").read_text())["metrics"][0])
    for name, (one, two) in weights.items():
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-6)
        for key in ("train/train_rollout_logprob_abs_diff", "train/grad_norm"):
            assert metrics[name][0][key] == pytest.approx(metrics[name][1][key], rel=1e-5)
        again = weights[name.replace("False", "True")]
        assert all(torch.equal(one[key], again[0][key]) and torch.equal(two[key], again[1][key]) for key in one)
