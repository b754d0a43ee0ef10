"""Environment variables that choose formats elsewhere, and the settings that they are here.

TransformerEngine reads the first one, and scripts of miles and slime set all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from miles.config.schema.flat_settings import FlatSettings

SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
INT4 = "OPEN_TRAINING_INT4_FAKE_QAT_FLAG"
GROUP_SIZE = "OPEN_TRAINING_INT4_GROUP_SIZE"
VARIABLES: Mapping[str, str] = {SCALES: "fp8_block_scales", INT4: "int4_qat", GROUP_SIZE: "int4_group_size"}
"""The setting of each."""


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """A setting that a variable asks for."""

    key: str
    value: Any
    variable: str
    """The variable and its value, as NAME = value."""


def asked_by(variables: Mapping[str, str], *, fp8: bool) -> tuple[Asked, ...]:
    """What variables ask for. Scales matter with FP8 training alone, and a group size with INT4's switch."""
    found = []
    if fp8 and SCALES in variables:
        scales = "float32" if variables[SCALES] == "1" else "power_of_two"  # as TransformerEngine reads it
        found.append(Asked(VARIABLES[SCALES], scales, f"{SCALES} = {variables[SCALES]}"))
    if INT4 in variables:
        on = variables[INT4] == "1"
        found.append(Asked(VARIABLES[INT4], on, f"{INT4} = {variables[INT4]}"))
        size = variables.get(GROUP_SIZE, "")
        if on and size.isdigit() and int(size):
            found.append(Asked(VARIABLES[GROUP_SIZE], int(size), f"{GROUP_SIZE} = {size}"))
    return tuple(found)


def not_given(s: FlatSettings, variables: Mapping[str, str]) -> tuple[Asked, ...]:
    """What variables ask for that the settings leave open, and that is not so anyway."""
    fp8 = s.is_valid("fp8_format") and s.fp8_format is not None
    return tuple(
        each
        for each in asked_by(variables, fp8=fp8)
        if s.is_valid(each.key) and not s.given(each.key) and each.value != getattr(s, each.key)
    )


def contradicted(s: FlatSettings, variables: Mapping[str, str]) -> tuple[Asked, ...]:
    """What variables ask for and the settings say otherwise."""
    found = asked_by(variables, fp8=s.fp8_format is not None)
    return tuple(each for each in found if getattr(s, each.key) not in (None, each.value))
