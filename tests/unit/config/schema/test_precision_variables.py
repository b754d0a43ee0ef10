"""Variables that choose formats elsewhere have the same effect here, or are refused."""

from __future__ import annotations

import pytest
from config_cases import MINIMAL, faults_for

from miles.config.checks.precision_variables import variable_faults
from miles.config.job import examine, resolution
from miles.config.notes import notes
from miles.config.schema.precision_variables import GROUP_SIZE, INT4, SCALES

FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}
QAT = {INT4: "1", GROUP_SIZE: "32"}


def test_variables_of_ranks_are_settings_of_trainer_and_engines() -> None:
    settings = examine({**MINIMAL, "train_env_vars": QAT}).settings
    assert (settings.int4_qat, settings.int4_group_size) == (True, 32)
    assert f"int4_qat = true: {INT4} = 1 in train_env_vars asks for it" in [str(each) for each in notes(settings)]
    settings = examine({**MINIMAL, **FP8, "train_env_vars": {SCALES: "0"}}).settings
    assert settings.fp8_block_scales == "power_of_two"


@pytest.mark.parametrize(
    "said",
    [
        {"train_env_vars": {SCALES: "0"}},
        {"train_env_vars": {INT4: "0", GROUP_SIZE: "32"}},
        {**FP8, "fp8_block_scales": "float32", "train_env_vars": {SCALES: "1"}},
    ],
)
def test_variables_without_an_effect_change_nothing(said: dict[str, object]) -> None:
    settings = examine(MINIMAL | said).settings
    assert not [each for each in notes(settings) if "int4" in str(each)]
    assert faults_for(**said) == []


def test_variables_of_this_environment_are_chosen_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QAT.items():
        monkeypatch.setenv(name, value)
    found = resolution(dict(MINIMAL), "cpu")
    assert (found.flat["int4_qat"], found.flat["int4_group_size"]) == (True, 32)
    assert f"int4_qat = true: {INT4} = 1 is set in the environment" in found.chosen
    assert resolution({**MINIMAL, "int4_qat": False}, "cpu").flat["int4_qat"] is False


def test_a_variable_of_this_environment_that_says_otherwise_is_refused() -> None:
    settings = examine({**MINIMAL, **FP8, "fp8_block_scales": "power_of_two"}).settings
    (fault,) = variable_faults(settings, {SCALES: "1"})
    assert str(fault) == (
        f"fp8_block_scales = power_of_two, but {SCALES} = 1 in the environment says otherwise; unset {SCALES}, or "
        "leave fp8_block_scales out"
    )
    assert list(variable_faults(settings, {SCALES: "0", INT4: "0"})) == []
    (fault,) = variable_faults(settings, {INT4: "1"})
    assert str(fault).startswith(f"int4_qat = false, but {INT4} = 1 in the environment says otherwise")
