"""Folders in FP8 and INT4 as hf_checkpoint of the fsdp backend and of engines; test_families has Megatron's."""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from quantised_models import RECIPES, write_quantised
from safetensors.torch import load_file
from torch_engine_models import Response, reference_log_probs, respond, running_engine
from trainer_cases import job_config, random_groups

from miles.checkpoint_folder import folder_name
from miles.config import JobConfig
from miles.precision.of_run import rollout_recipe
from miles.precision.quantization_config import recipe_of
from miles.services.rollout.engines.checkpoint_weights import read_published
from miles.services.trainer.ranks.worker import create_backend
from miles.weights.hf_folder.plain_tensors import PlainTensors
from miles.weights.hf_folder.pretrained import read_model

pytestmark = pytest.mark.engine

CASES = [("Llama, tied", "fp8"), ("Qwen3-MoE", "int4, experts"), ("DeepSeek-V3, MTP", "fp8"), ("MiniMax-M2", "int4")]
PROMPT = [3 + 7 * i % 90 for i in range(24)]


@pytest.fixture
def ranks() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parts(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(same_tensor(found[name], each) for name, each in expected.items())


def same_tensor(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.float(), expected.float())


def config_of(folder: pathlib.Path, run_dir: pathlib.Path, **changes: object) -> JobConfig:
    changes = {"rollout_dtype": "bfloat16", **changes}
    return job_config(folder, run_dir=str(run_dir), log_samples_per_step=0, **changes)


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_fsdp_trains_one_and_writes_either_form(tmp_path: pathlib.Path, family: str, kind: str) -> None:
    folder = write_quantised(family, tmp_path / "model", RECIPES[kind], torch.bfloat16)
    for form in ("as_trained", "rollout"):
        backend = create_backend(
            config_of(folder, tmp_path / "run", save_hf_format=form), tmp_path, torch.device("cpu")
        )
        state = backend.load()
        try:
            backend.save_hf(tmp_path / form)
            if form == "as_trained":
                groups = random_groups(0)
                for sample in (sample for group in groups for sample in group.samples):
                    sample.rollout_log_probs = np.full(len(sample.tokens) - sample.prompt_length, -3.0, np.float32)
                assert backend.train(0, groups, lambda progress: None)["train/grad_norm"] > 0
                backend.save(tmp_path / "run" / "checkpoints" / folder_name(1), state)
                backend.save_hf(tmp_path / "trained")
        finally:
            backend.close()
    plain = PlainTensors(folder, torch.bfloat16)
    assert same(parts(tmp_path / "as_trained"), dict(plain))
    assert "quantization_config" not in json.loads((tmp_path / "as_trained" / "config.json").read_text())
    assert same(parts(tmp_path / "rollout"), parts(folder))
    resumed = create_backend(config_of(folder, tmp_path / "run"), tmp_path / "run" / "checkpoints", torch.device("cpu"))
    resumed.load()
    try:
        resumed.save_hf(tmp_path / "resumed")
    finally:
        resumed.close()
    assert same(parts(tmp_path / "resumed"), parts(tmp_path / "trained"))
    assert not same(parts(tmp_path / "resumed"), parts(tmp_path / "as_trained"))
    assert recipe_of(json.loads((tmp_path / "rollout" / "config.json").read_text())) == plain.recipe


@pytest.mark.parametrize("form", ["auto", "as_trained"])
def test_the_torch_engine_serves_what_its_parts_stand_for(tmp_path: pathlib.Path, form: str) -> None:
    folder = write_quantised("Qwen3-MoE", tmp_path / "model", RECIPES["int4, experts"])
    config = config_of(folder, tmp_path / "run", rollout_dtype="float32", rollout_weight_format=form)
    weights, recipe = read_published(config), rollout_recipe(config)
    assert any(name.endswith("_packed") for name in weights) is (recipe is not None) is (form == "auto")

    async def answer() -> Response:
        async with running_engine(folder, weights, recipe=recipe) as engine:
            return await respond(engine, PROMPT, max_new_tokens=8, seed=1)

    tokens, log_probs, _ = asyncio.run(answer())
    model = read_model(folder, torch.float32, attn_implementation="eager").eval()
    expected = reference_log_probs(model, PROMPT, tokens)
    torch.testing.assert_close(torch.tensor(log_probs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), CASES[1:3])
def test_engines_are_sent_the_bytes_of_the_folder(tmp_path: pathlib.Path, family: str, kind: str) -> None:
    """Where there is no trainer; what it publishes first is the same."""
    folder = write_quantised(family, tmp_path / "model", RECIPES[kind], torch.bfloat16)
    config = config_of(folder, tmp_path / "run", train_backend="megatron", rollout_backend="sglang")
    stored, published = parts(folder), read_published(config)
    assert len(published) > 100
    assert all(same_tensor(tensor, stored[name]) for name, tensor in published.items())
    left_out = {name for name in stored.keys() - published.keys() if not name.startswith("model.layers.4.")}
    assert not left_out
