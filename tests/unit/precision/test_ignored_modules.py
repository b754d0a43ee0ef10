"""Modules that folders list as not quantised, by the rules of the programs that read such lists."""

from __future__ import annotations

import pytest

from miles.precision.layers import QuantisedLayers
from miles.precision.quantization_config import quantization_config, recipe_of
from miles.precision.recipe import Recipe

LAYER = "model.layers.1."
NAMES = {
    f"{LAYER}self_attn.q_proj.weight": 2,
    f"{LAYER}mlp.gate.weight": 2,
    f"{LAYER}mlp.gate_proj.weight": 2,
    f"{LAYER}mlp.experts.0.up_proj.weight": 2,
    f"{LAYER}mlp.experts.10.up_proj.weight": 2,
    f"{LAYER}mlp.shared_experts.up_proj.weight": 2,
    f"{LAYER}eh_proj.weight": 2,
    f"{LAYER}shared_head.head.weight": 2,
    f"{LAYER}input_layernorm.weight": 1,
    "lm_head.weight": 2,
}


def covered(layers: QuantisedLayers) -> set[str]:
    names = {name for name, dimensions in NAMES.items() if layers.cover(name, dimensions)}
    return {name.removeprefix(LAYER).removesuffix(".weight") for name in names}


EVERY = {
    "self_attn.q_proj", "mlp.gate_proj", "mlp.experts.0.up_proj", "mlp.experts.10.up_proj", "mlp.shared_experts.up_proj"
}  # fmt: skip


@pytest.mark.parametrize(
    ("ignored", "inside", "kept"),
    [
        ((), True, set()),
        (("model.layers.1.mlp.experts.1",), True, set()),
        (("model.layers.1.mlp",), True, EVERY - {"self_attn.q_proj"}),
        (("model.layers.1.mlp",), False, set()),
        (("gate",), True, set()),
        (("self_attn",), True, {"self_attn.q_proj"}),
        (("q_proj",), False, {"self_attn.q_proj"}),
        (("model.layers.1.mlp.experts.0",), False, set()),
        (("re:.*self_attn.*", r"re:.*mlp\.(gate|up)_proj"), False, {"self_attn.q_proj", "mlp.gate_proj"}),
        (("re:self_attn",), True, set()),
    ],
)
def test_a_name_stands_for_modules_by_its_format(ignored: tuple[str, ...], inside: bool, kept: set[str]) -> None:
    assert covered(QuantisedLayers(ignored=ignored, ignores_inside=inside)) == EVERY - kept


@pytest.mark.parametrize("recipe", [Recipe(format="fp8_block"), Recipe(format="int4", group_size=32)])
def test_what_a_folder_says_covers_what_was_written(recipe: Recipe) -> None:
    kept = [name.removesuffix(".weight") for name in NAMES if "experts." not in name]
    found = recipe_of({"quantization_config": quantization_config(recipe, kept)})
    assert found is not None
    assert (found.format, found.group_size) == (recipe.format, recipe.group_size)
    assert covered(found.layers) == {name for name in EVERY if "experts." in name}
