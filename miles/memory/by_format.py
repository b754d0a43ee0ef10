"""The weights of a whole model in each format, whatever a run does."""

from __future__ import annotations

from miles.memory.held import Held, held
from miles.memory.model import ModelShape
from miles.memory.tensors import model_tensors
from miles.precision.layers import QuantisedLayers
from miles.precision.recipe import INT4_GROUP, Recipe

ROUTED_EXPERTS = QuantisedLayers(only=(".experts.",))


def weights_by_format(shape: ModelShape, group_size: int = INT4_GROUP) -> dict[str, Held]:
    """Return a model's weights without MTP layers by format and what is in it; all else is in bfloat16.

    Args:
        group_size: of INT4.
    """
    matrices = "every matrix of the layers"
    recipes: dict[str, Recipe | None] = {"bf16": None, f"fp8_block, {matrices}": Recipe(format="fp8_block")}
    if shape.experts:
        name = f"int4 by {group_size}, routed experts"
        recipes[name] = Recipe(format="int4", group_size=group_size, layers=ROUTED_EXPERTS)
    recipes |= {
        f"int4 by {group_size}, {matrices}": Recipe(format="int4", group_size=group_size),
        f"mxfp8, {matrices}": Recipe(format="mxfp8"),
        f"nvfp4, {matrices}": Recipe(format="nvfp4"),
    }
    return {name: held(model_tensors(shape), recipe, 2) for name, recipe in recipes.items()}
