from __future__ import annotations

import pytest
from config_cases import MINIMAL, faults_for

from miles.config import JobConfig
from miles.config.layer_frequency import expert_layers, parse_layer_frequency


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("1", [1, 1, 1, 1]),
        ("2", [1, 0, 1, 0]),
        ("[0,1,1,1]", [0, 1, 1, 1]),
        ("[0]*1+[1]*3", [0, 1, 1, 1]),
        ("([0, 1] * 2)", [0, 1, 0, 1]),
        ("2*[1]+[0]+[1]", [1, 1, 0, 1]),
    ],
)
def test_a_number_or_a_list_says_which_layers_have_experts(text: str, layers: list[int]) -> None:
    assert expert_layers(parse_layer_frequency(text), 4) == layers


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "x", "[0]*10**9", "[0]*99999999", "[2]", "[[1]]", "print(1)", "[1]-[1]", "True", "", "[", "[1]*-1"],
)
def test_nothing_else_is_read_and_nothing_is_evaluated(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_layer_frequency(text)


def test_a_file_may_have_a_number_or_a_list() -> None:
    for value, text in ((2, "2"), ([0, 1], "[0,1]"), ("[0] + [1]*2", "[0]+[1]*2")):
        assert JobConfig.from_flat(MINIMAL | {"moe_layer_freq": value}).experts.moe_layer_freq == text
    assert faults_for(moe_layer_freq="[0]*x") == [
        "moe_layer_freq = [0]*x, but it is not a list of numbers; give a number, or a list like [0]*3+[1]*58"
    ]
