"""`miles convert hf-to-fp8`, `hf-to-int4` and `verify`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import pytest
import torch
from megatron_models import write_model
from quantised_models import change_config
from safetensors.torch import load_file, save_file

from miles.precision.quantization_config import recipe_of
from miles.precision.tensors import QuantisedTensors
from miles.services.trainer.convert import main
from miles.weights.hf_folder.plain_tensors import PlainTensors
from miles.weights.naming.model_tensors import read_model_tensors

FP8: tuple[str, ...] = ("hf-to-fp8",)
INT4 = ("hf-to-int4", "--int4-group-size", "8")


def convert(how: Sequence[str], source: pathlib.Path, target: pathlib.Path, dtype: str = "bfloat16") -> int:
    direction, *options = how
    return main([direction, "--hf-checkpoint", str(source), "--save", str(target), "--dtype", dtype, *options])


def verify(source: pathlib.Path, quantised: pathlib.Path) -> int:
    return main(["verify", "--hf-checkpoint", str(source), "--quantised", str(quantised)])


def stored(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_of(folder: pathlib.Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("Llama, tied", FP8),
        ("Qwen3-MoE", INT4),
        ("DeepSeek-V3, MTP", (*FP8, "--fp8-block-scales", "power_of_two")),
        ("GLM-4.5, MTP", INT4),
        ("MiniMax-M2", (*INT4, "--int4-layers", ".")),
    ],
)
def test_a_folder_holds_what_the_trainer_would_publish(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], family: str, how: Sequence[str]
) -> None:
    source, target = write_model(family, tmp_path / "source"), tmp_path / "target"
    assert convert(how, source, target) == 0
    recipe, model, plain = recipe_of(config_of(target)), read_model_tensors(source), stored(source)
    assert recipe is not None
    quantised = QuantisedTensors(recipe)
    exported = {name: t.to(model.exported_dtype(name, t.dtype, torch.bfloat16)) for name, t in plain.items()}
    expected = {part: made for name, t in exported.items() for part, made in quantised.convert(name, t)}
    found = stored(target)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
    tensors = PlainTensors(target, torch.bfloat16)
    covered = {name for name in tensors if tensors.is_quantised(name)}
    assert len(covered) > 20
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in covered}.isdisjoint({"gate", "eh_proj", "head"})
    if model.mtp:
        assert any(name.startswith("model.layers.4.mlp.experts.") for name in covered)
    assert {path.name for path in source.iterdir()} <= {path.name for path in target.iterdir()}
    assert verify(source, target) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_options_are_a_runs_settings(tmp_path: pathlib.Path) -> None:
    source = write_model("Qwen3-MoE", tmp_path / "source")
    kept = ("--extra-high-precision-layers-hf", "o_proj", "--ignore-rules", "re:.*self_attn.q_proj")
    ends = ("--first-last-layers-bf16", "--num-layers-at-end-in-bf16", "0")
    assert convert((*FP8, *kept, *ends), source, tmp_path / "target") == 0
    tensors = PlainTensors(tmp_path / "target", torch.bfloat16)
    names = {name.removesuffix(".weight") for name in tensors if tensors.is_quantised(name)}
    assert {name.split(".")[2] for name in names} == {"1", "2", "3"}
    assert {name.rpartition(".")[2] for name in names} == {"k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}


def test_other_tensors_of_the_folder_are_carried_along(tmp_path: pathlib.Path) -> None:
    source = write_model("Llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors") | {"extra.proj.weight": torch.ones(8, 8)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert convert(FP8, source, tmp_path / "target") == 0
    assert torch.equal(stored(tmp_path / "target")["extra.proj.weight"], torch.ones(8, 8).bfloat16())
    recipe = recipe_of(config_of(tmp_path / "target"))
    assert recipe is not None
    assert not recipe.layers.cover("extra.proj.weight", 2)
    assert (tmp_path / "target" / "generation_config.json").read_text() == '{"eos_token_id": 7}'
    assert verify(source, tmp_path / "target") == 0


def test_verify_names_what_differs(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write_model("Llama", tmp_path / "source"), tmp_path / "target"
    assert convert(INT4 + ("--int4-layers", "."), source, target) == 0
    tensors = load_file(target / "model.safetensors")
    prefix = "model.layers.0.self_attn."
    tensors[f"{prefix}q_proj.weight_packed"][0, 0] ^= 1
    tensors[f"{prefix}k_proj.weight_scale"][0, 0] *= 1.01
    tensors[f"{prefix}v_proj.weight_shape"] = tensors[f"{prefix}v_proj.weight_shape"].int()  # as others write it
    tensors["model.norm.weight"][0] += 1
    for part in ("packed", "scale", "shape"):
        del tensors[f"{prefix}o_proj.weight_{part}"]
    tensors["other.weight"] = torch.ones(2)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    assert verify(source, target) == 1
    out = capsys.readouterr().out.splitlines()
    assert set(out[:-1]) == {
        f"{prefix}q_proj.weight has other _packed",
        f"{prefix}k_proj.weight has other _scale",
        f"{prefix}o_proj.weight is missing",
        "model.norm.weight has other values",
        f"other.weight is not in {source}",
    }
    assert out[-1] == f"{target} is not what {source} becomes: 5 tensors differ"
    assert verify(target, source) == 1
    assert f"the weights of {source} are not quantised" in capsys.readouterr().err


def test_what_cannot_be_quantised_leaves_nothing_behind(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model("Qwen3-MoE", tmp_path / "source")
    assert convert(("hf-to-int4", "--int4-group-size", "32"), source, tmp_path / "target") == 1
    assert "32 matrices cannot be int4: model.layers.0.mlp.experts.0.down_proj.weight" in capsys.readouterr().err
    change_config(source, quantization_config={"quant_method": "gptq"})
    assert convert(FP8, source, tmp_path / "target") == 1
    assert "quantised by gptq, which is not known here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("how", "same"), [(INT4, True), ((*FP8, "--fp8-block-scales", "power_of_two"), True)])
def test_a_folder_made_of_a_quantised_one_is_the_same(tmp_path: pathlib.Path, how: Sequence[str], same: bool) -> None:
    source = write_model("Qwen3-MoE", tmp_path / "source")
    assert convert(how, source, tmp_path / "once") == 0
    assert convert(how, tmp_path / "once", tmp_path / "twice") == 0
    once, twice = PlainTensors(tmp_path / "once", torch.float32), PlainTensors(tmp_path / "twice", torch.float32)
    assert all(torch.equal(twice[name], tensor) for name, tensor in once.items()) is same
