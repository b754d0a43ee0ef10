from __future__ import annotations

import pytest
import torch

from miles.precision.recipe import Recipe
from miles.services.trainer.backends.megatron.precision.covered import Weight, has_other_blocks


@pytest.mark.parametrize("covered", [(False, False), (True, False), (True, True)])
def test_a_covered_weight_of_unknown_matrices_may_have_other_blocks(
    covered: tuple[bool, ...],
) -> None:
    weight = Weight("decoder.layers.0.mixer.in_proj.weight", "weight", None, torch.empty(256, 256), None, covered)
    assert has_other_blocks(Recipe(format="fp8_block"), weight) is any(covered)
