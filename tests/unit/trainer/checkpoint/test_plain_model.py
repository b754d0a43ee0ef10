"""`miles convert hf-to-hf` takes the text model, with plain weights, out of a folder as they are published."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from megatron_models import FAMILIES, SIZES, write_model
from quantised_models import RECIPES, change_config, write_quantised
from safetensors.torch import load_file, save_file

from miles.config.checks.published_form import why_not_read
from miles.services.trainer.convert import main
from miles.weights.hf_folder.plain_tensors import PlainTensors

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURE = {**VISION, "image_size": 16, "patch_size": 8}


def convert(source: pathlib.Path, target: pathlib.Path) -> int:
    return main(["hf-to-hf", "--hf-checkpoint", str(source), "--save", str(target), "--dtype", "float32"])


def stored(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("family", "kind"), [("DeepSeek-V3, MTP", "fp8"), ("MiniMax-M2", "int4")])
def test_quantised_weights_become_what_they_stand_for(tmp_path: pathlib.Path, family: str, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    source = write_quantised(family, tmp_path / "source", RECIPES[kind])
    assert convert(source, tmp_path / "plain") == 0
    before, after = PlainTensors(source, torch.float32), stored(tmp_path / "plain")
    assert sum(map(before.is_quantised, before)) > 50
    assert after.keys() == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.dtype is torch.float32


def wrapped(kind: str) -> Any:
    """A model with a text model inside, of random weights."""
    import transformers

    torch.manual_seed(0)
    prefix, text, changes = {
        "gemma3": ("Gemma3", FAMILIES["Gemma 3"][1], {"mm_tokens_per_image": 4, "image_token_index": 90}),
        "llama4": ("Llama4", FAMILIES["Llama 4"][1], {}),
    }[kind]
    projected = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 16)
    vision = {**PICTURE, **(projected if kind == "llama4" else {})}
    config = getattr(transformers, f"{prefix}Config")(text_config={**SIZES, **text}, vision_config=vision, **changes)
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("kind", ["gemma3", "llama4"])
def test_a_text_model_gives_the_same_answers_by_itself(tmp_path: pathlib.Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model = wrapped(kind)
    model.save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "plain") == 0
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    assert text.config.model_type == f"{kind}_text"
    assert why_not_read(json.loads((tmp_path / "plain" / "config.json").read_text())) is None
    tokens = torch.arange(3, 27)[None]
    with torch.no_grad():
        torch.testing.assert_close(text(tokens).logits, model(input_ids=tokens).logits, rtol=0, atol=1e-6)


def test_a_text_model_is_found_below_the_common_prefix(tmp_path: pathlib.Path) -> None:
    """As in Gemma 3n's folders; its other parts need packages that are not installed, so they are made up here."""
    source = write_model("Gemma 3n", tmp_path / "source")
    text = load_file(source / "model.safetensors")
    inner = {f"model.language_model.{name.removeprefix('model.')}": tensor for name, tensor in text.items()}
    save_file({**inner, "model.vision_tower.weight": torch.ones(2)}, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    outer = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "eos_token_id": [1, 106]}
    (source / "config.json").write_text(json.dumps(outer | {"text_config": config}))
    assert convert(source, tmp_path / "plain") == 0
    after = stored(tmp_path / "plain")
    assert after.keys() == text.keys()
    assert all(torch.equal(after[name], text[name]) for name in text)
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert plain["architectures"] == ["Gemma3nForCausalLM"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq, which is not known here"),
        ({"text_config": {"model_type": "kimi_k9"}}, "its text model is a kimi_k9, which transformers does not know"),
        ({"num_hidden_layers": 5}, "model.layers.4.mlp.gate_proj.weight (48, 32) is missing"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing_behind(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str
) -> None:
    source = write_model("Llama", tmp_path / "source")
    change_config(source, **changes)
    assert convert(source, tmp_path / "plain") == 1
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("direction", ["hf-to-dist", "dist-to-hf"])
def test_other_conversions_want_a_known_form(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], direction: str
) -> None:
    source = write_model("Llama", tmp_path / "source")
    change_config(source, quantization_config={"quant_method": "gptq"})
    load = ["--load", str(tmp_path)] if direction == "dist-to-hf" else []
    assert main([direction, "--hf-checkpoint", str(source), "--save", str(tmp_path / "out"), *load]) == 1
    assert "cannot be converted: its weights are quantised by gptq" in capsys.readouterr().err
