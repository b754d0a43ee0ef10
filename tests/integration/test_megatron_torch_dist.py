"""Models that Megatron-LM saved in its torch_dist format, as first weights, reference and critic."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from megatron_kit import needs_megatron, run_cases, run_python
from megatron_models import write_model
from safetensors.torch import load_file

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600), needs_megatron]

SAVE_AS_MEGATRON_LM = """
import argparse, pathlib, sys
import torch
from megatron.core import dist_checkpointing
from miles.services.trainer.convert import _job_config, _model, _parser
from miles.services.trainer.ranks.process_group import join
model, out, each = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3] == "True"
join("cpu", None, 10)
options = _parser().parse_args(["hf-to-dist", "--hf-checkpoint", model, "--save", "unused", "--dtype", "float32"])
chunk = _model(_job_config(options)).bare_chunks[0]
(out / "release").mkdir(parents=True)
tensors = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": each})
common = {"args": argparse.Namespace(tensor_model_parallel_size=1), "iteration": 0, "checkpoint_version": 3.0}
dist_checkpointing.save({**common, "model": tensors}, str(out / "release"))
torch.save(common, out / "release" / "common.pt")
(out / "latest_checkpointed_iteration.txt").write_text("release")
torch.distributed.destroy_process_group()
"""


def saved_as_megatron_lm(model: pathlib.Path, out: pathlib.Path, *, each_layer: bool) -> str:
    """Its weights with the keys of a release checkpoint, of each layer or of all layers together."""
    run_python(["-c", SAVE_AS_MEGATRON_LM, str(model), str(out), str(each_layer)])
    return str(out)


def case(name: str, model: pathlib.Path, **flags: Any) -> dict[str, Any]:
    kl = {"train_backend": "megatron", "use_kl_loss": True, "kl_loss_coef": 0.1, "adam_eps": 1e-3}
    return {"name": name, "model": str(model), "flags": {**kl, **flags}, "steps": 1}


def result(out: pathlib.Path, name: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    metrics: dict[str, float] = json.loads((out / f"{name}.json").read_text())["metrics"][0]
    return metrics, load_file(out / f"{name}.safetensors")


def assert_alike(out: pathlib.Path, name: str, other: str, tolerance: float = 0.0) -> None:
    one, two = result(out, name)[1], result(out, other)[1]
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, two[key], rtol=tolerance, atol=tolerance, msg=f"{name} {key}")


def test_a_reference_in_torch_dist_is_what_the_policy_starts_from(tmp_path: pathlib.Path) -> None:
    hf, wanted = (write_model("Llama", tmp_path / name, seed) for seed, name in enumerate(("hf", "wanted")))
    saved = saved_as_megatron_lm(wanted, tmp_path / "wanted_torch_dist", each_layer=False)
    cases = [
        case("wanted", wanted),
        case("reference", hf, ref_load=saved),
        case("loaded", hf, load=saved, ref_load=str(hf)),  # the policy alone is of the checkpoint
    ]
    run_cases(cases, tmp_path)
    assert_alike(tmp_path, "wanted", "reference")
    assert result(tmp_path, "reference")[0]["train/kl_loss"] == 0
    assert result(tmp_path, "loaded")[0]["train/kl_loss"] != 0


@pytest.mark.slow
def test_other_layouts_roles_and_names_of_layers(tmp_path: pathlib.Path) -> None:
    hf, wanted = (write_model("Qwen3-MoE", tmp_path / name, seed) for seed, name in enumerate(("hf", "wanted")))
    saved = saved_as_megatron_lm(wanted, tmp_path / "wanted_torch_dist", each_layer=True)
    ppo = {"advantage_estimator": "ppo", "critic_lr": 0.02}
    cases = [
        case("wanted", wanted),
        case("critic-wanted", hf, critic_load=str(wanted), **ppo),
        case("critic", hf, critic_load=saved, **ppo),
    ]
    run_cases(cases, tmp_path)
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}
    run_cases([case("split", hf, ref_load=saved, **layout)], tmp_path, ranks=2)
    assert_alike(tmp_path, "wanted", "split", tolerance=2e-4)
    assert_alike(tmp_path, "critic-wanted", "critic")
    values = [result(tmp_path, name)[0]["train/value_loss"] for name in ("critic-wanted", "critic")]
    assert values[0] == values[1]


@pytest.mark.slow
def test_it_becomes_a_hugging_face_folder(tmp_path: pathlib.Path) -> None:
    hf, wanted = (write_model("Llama", tmp_path / name, seed) for seed, name in enumerate(("hf", "wanted")))
    saved = saved_as_megatron_lm(wanted, tmp_path / "wanted_torch_dist", each_layer=True)
    arguments = ["dist-to-hf", "--hf-checkpoint", str(hf), "--load", saved, "--save", str(tmp_path / "back")]
    run_python(["-m", "miles.services.trainer.convert", *arguments, "--dtype", "float32"])
    one, other = (load_file(folder / "model.safetensors") for folder in (wanted, tmp_path / "back"))
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[key]) for key, tensor in one.items())


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(tmp_path: pathlib.Path) -> None:
    hf, other = (write_model(family, tmp_path / family) for family in ("Llama", "Qwen3-MoE"))
    saved = saved_as_megatron_lm(other, tmp_path / "other_torch_dist", each_layer=True)
    with pytest.raises(pytest.fail.Exception, match=r"it is of another model than hf_checkpoint|cannot be read"):
        run_cases([case("refused", hf, ref_load=saved)], tmp_path)
