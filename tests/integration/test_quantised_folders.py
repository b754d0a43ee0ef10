"""Folders in FP8 and INT4 as hf_checkpoint of every trainer and of the torch engine."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron_families import write_expected
from megatron_kit import SUPPORT, needs_megatron, run_python
from quantised_models import RECIPES, write_quantised
from safetensors.torch import load_file
from trainer_cases import job_config, random_groups

from miles.config import JobConfig
from miles.precision.quantization_config import recipe_of
from miles.precision.tensors import QuantisedTensors
from miles.services.rollout.engines.checkpoint_weights import read_published
from miles.services.trainer.ranks.worker import create_backend
from miles.weights.export_format import formatted
from miles.weights.hf_folder.plain_tensors import PlainTensors

pytestmark = pytest.mark.engine
"""Quantised from bfloat16, as folders are, they are the same bytes when they are quantised again."""
CASES = [("Llama, tied", "fp8"), ("Qwen3-MoE", "int4, experts"), ("DeepSeek-V3, MTP", "fp8"), ("MiniMax-M2", "int4")]


@pytest.fixture
def ranks() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parts(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float())
        for name, tensor in expected.items()
    )


def config_of(folder: pathlib.Path, run_dir: pathlib.Path, **changes: object) -> JobConfig:
    return job_config(folder, run_dir=str(run_dir), log_samples_per_step=0, rollout_dtype="bfloat16", **changes)


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_fsdp_trains_one_and_writes_either_form(tmp_path: pathlib.Path, family: str, kind: str) -> None:
    folder = write_quantised(family, tmp_path / "model", RECIPES[kind], torch.bfloat16)
    for form in ("as_trained", "rollout"):
        backend = create_backend(
            config_of(folder, tmp_path / "run", save_hf_format=form), tmp_path, torch.device("cpu")
        )
        backend.load()
        try:
            backend.save_hf(tmp_path / form)
            if form == "as_trained":
                groups = random_groups(0)
                for sample in (sample for group in groups for sample in group.samples):
                    sample.rollout_log_probs = np.full(len(sample.tokens) - sample.prompt_length, -3.0, np.float32)
                assert backend.train(0, groups, lambda progress: None)["train/grad_norm"] > 0
        finally:
            backend.close()
    plain = PlainTensors(folder, torch.bfloat16)
    assert same(parts(tmp_path / "as_trained"), dict(plain))
    assert "quantization_config" not in json.loads((tmp_path / "as_trained" / "config.json").read_text())
    assert same(parts(tmp_path / "rollout"), parts(folder))
    assert recipe_of(json.loads((tmp_path / "rollout" / "config.json").read_text())) == plain.recipe


@pytest.mark.parametrize(("family", "kind"), CASES[1:3])
def test_the_torch_engine_serves_what_its_parts_stand_for(tmp_path: pathlib.Path, family: str, kind: str) -> None:
    folder = write_quantised(family, tmp_path / "model", RECIPES[kind], torch.bfloat16)
    config = config_of(folder, tmp_path / "run")
    published = read_published(config)
    weights = read_published(config_of(folder, tmp_path / "run", rollout_weight_format="as_trained"))
    assert same(published, dict(formatted(QuantisedTensors(RECIPES[kind]), weights.items())))


@needs_megatron
@pytest.mark.timeout(1800)
def test_megatron_computes_with_what_the_parts_stand_for(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    for number, (family, kind) in enumerate(CASES):
        folder = write_quantised(family, tmp_path / f"model-{number}", RECIPES[kind])
        write_expected(folder)
        shutil.move(folder, root)
    output = run_python([str(SUPPORT / "megatron_families.py"), str(root)])
    found = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    assert len(found) == len(CASES)
    for line in found:
        assert "error" not in line, line
        assert line["logits"] < 2e-5
        assert line["weights_equal"]
