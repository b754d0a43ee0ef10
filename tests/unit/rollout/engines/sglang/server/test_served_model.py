"""The description of a model that servers start from when it is served in another format than its folder's."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
from sglang_kit import CPU_PYTHON, ON_GPU, have_sglang
from torch_engine_models import save_checkpoint
from transformers import AutoTokenizer

from miles.precision.layers import QuantisedLayers
from miles.precision.quantization_config import recipe_of
from miles.precision.recipe import Recipe
from miles.services.rollout.engines.sglang.server.served_model import (
    needs_own_folder,
    served_quantisation,
    write_folder,
)

SHAPES = {
    "model.embed_tokens.weight": (320, 256),
    "lm_head.weight": (320, 256),
    "model.norm.weight": (256,),
    **{
        f"model.layers.{layer}.{name}.weight": (256, 256)
        for layer in range(3)
        for name in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            "mlp.gate",
            *(f"mlp.experts.{expert}.{kind}_proj" for expert in range(4) for kind in ("gate", "up", "down")),
            *(f"mlp.shared_experts.{kind}_proj" for kind in ("gate", "up", "down")),
        )
    },
}
FP8 = Recipe(format="fp8_block", layers=QuantisedLayers(high_layers=frozenset({2}), but=("shared_experts",)))
INT4 = Recipe(
    format="int4", layers=QuantisedLayers(only=(".experts.",), high_layers=frozenset({2})), group_size=64
)  # fmt: skip


def test_a_layers_experts_are_one_entry() -> None:
    ignored = served_quantisation(FP8, SHAPES)["modules_to_not_convert"]
    assert [entry for entry in ignored if "experts" in entry and "shared" not in entry] == [
        "model.layers.2.mlp.experts"
    ]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.shared_experts.up_proj"} <= set(ignored)
    assert not any("norm" in entry for entry in ignored)


@pytest.mark.parametrize("recipe", [FP8, INT4], ids=lambda recipe: recipe.format)
def test_what_is_stated_covers_what_the_recipe_does(recipe: Recipe) -> None:
    stated = recipe_of({"quantization_config": served_quantisation(recipe, SHAPES)})
    assert stated is not None
    assert (stated.format, stated.group_size) == (recipe.format, recipe.group_size)
    for name, shape in SHAPES.items():
        assert stated.layers.cover(name, len(shape)) == recipe.layers.cover(name, len(shape)), name


def test_the_folder_has_the_description_and_all_but_the_weights(tmp_path: pathlib.Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    save_checkpoint(source, "qwen3")
    (source / "hf_quant_config.json").write_text("{}")
    assert not needs_own_folder(str(source), None)
    assert needs_own_folder(str(source), FP8)
    write_folder(folder, str(source), served_quantisation(FP8, SHAPES))
    assert recipe_of(json.loads((folder / "config.json").read_text())) is not None
    assert AutoTokenizer.from_pretrained(folder).encode("ab") == AutoTokenizer.from_pretrained(source).encode("ab")
    assert not [*folder.glob("*.safetensors*"), *folder.glob("hf_*")]
    assert needs_own_folder(str(folder), None)
    write_folder(tmp_path / "plain", str(folder), None)
    plain, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "plain", source))
    assert plain == before


_ASK = """
import json, sys, torch
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.utils import is_layer_skipped
class Linear(torch.nn.Module): pass
fp8, int4, names = json.load(sys.stdin)
blocks, groups = Fp8Config.from_config(fp8), CompressedTensorsConfig.from_config(int4)
asked = [name + (".0.gate_proj" if name.endswith(".experts") else "") for name in names]
print(json.dumps([
    [name for name in names if not is_layer_skipped(name, blocks.ignored_layers)],
    [name for name, ask in zip(names, asked) if groups.get_scheme_dict(Linear(), ask) is not None],
    groups.get_scheme_dict(Linear(), asked[-1])["weights"].group_size, blocks.weight_block_size,
]))
"""


@pytest.mark.skipif(not have_sglang(), reason="MILES_TEST_SGLANG is not set")
def test_sglang_reads_it_as_it_is_meant() -> None:
    dense = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.shared_experts.gate_up_proj", "mlp.gate")
    names = ["lm_head", *(f"model.layers.{i}.{name}" for i in (2, 1, 0) for name in (*dense, "mlp.experts"))]
    given = json.dumps([*(served_quantisation(recipe, SHAPES) for recipe in (FP8, INT4)), names])
    python = sys.executable if ON_GPU else str(CPU_PYTHON)
    answer = subprocess.run([python, "-c", _ASK], input=given, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    fp8, int4, group_size, block = json.loads(answer.stdout.splitlines()[-1])
    assert set(int4) == {f"model.layers.{i}.mlp.experts" for i in (0, 1)}
    assert set(fp8) == set(int4) | {
        f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("qkv_proj", "o_proj")
    }
    assert (group_size, block) == (64, [128, 128])
