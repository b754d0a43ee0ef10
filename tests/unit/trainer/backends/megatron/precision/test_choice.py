from __future__ import annotations

import pathlib
from typing import Any

import pytest
from trainer_cases import job_config, write_dense_model

from miles.services.trainer.backends.megatron.precision.choice import SCALES_VARIABLE, choose_scales, low_precision

FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({}, {}, "1"),
        ({}, {SCALES_VARIABLE: "0"}, "0"),
        (FP8, {SCALES_VARIABLE: "0"}, "1"),
        ({**FP8, "fp8_block_scales": "power_of_two"}, {}, "0"),
        ({"int4_qat": True}, {}, "1"),
    ],
)
def test_transformer_engine_scales_as_the_recipe_says(
    model: pathlib.Path, flags: dict[str, Any], before: dict[str, str], after: str
) -> None:
    environment = dict(before)
    choose_scales(job_config(model, train_backend="megatron", **flags), environment)
    assert environment == {SCALES_VARIABLE: after}


def test_formats_that_transformer_engine_lacks_are_emulated(model: pathlib.Path) -> None:
    low = low_precision(job_config(model, train_backend="megatron", int4_qat=True, int4_layers=["."]))
    assert low is not None
    assert (low.by_engine, low.needs_local_layers) == (False, False)
    assert "does not round to int4" in low.reason


def test_inputs_are_rounded_in_local_layers(model: pathlib.Path) -> None:
    low = low_precision(job_config(model, train_backend="megatron", low_precision_impl="emulated", **FP8))
    assert low is not None
    assert low.needs_local_layers
    assert low_precision(job_config(model, train_backend="megatron")) is None


def test_layers_without_the_engine_do_not_compute_by_its_kernels(model: pathlib.Path) -> None:
    low = low_precision(job_config(model, train_backend="megatron", transformer_impl="local", **FP8))
    assert low is not None
    assert not low.by_engine
    assert low.reason == "transformer_impl is local"
