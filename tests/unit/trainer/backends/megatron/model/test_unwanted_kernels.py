from __future__ import annotations

import dataclasses

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.services.trainer.backends.megatron.model.build_model import unwanted_kernels

KERNELS = {
    "apply_rope_fusion": "apply_rope_fusion",
    "bias_swiglu_fusion": "bias_activation_fusion",
    "bias_dropout_fusion": "bias_dropout_fusion",
    "masked_softmax_fusion": "masked_softmax_fusion",
}
"""Our settings, and Megatron-Core's."""


def test_no_kernel_is_turned_off_unless_that_is_asked_for() -> None:
    assert unwanted_kernels(JobConfig.from_flat(MINIMAL).numerics) == {}


@pytest.mark.parametrize("key", KERNELS)
def test_a_kernel_that_is_turned_off_is_one_of_megatron_core(key: str) -> None:
    transformer_config = pytest.importorskip("megatron.core.transformer.transformer_config")
    config = JobConfig.from_flat(MINIMAL | {key: False})
    assert unwanted_kernels(config.numerics) == {KERNELS[key]: False}
    assert KERNELS[key] in {field.name for field in dataclasses.fields(transformer_config.TransformerConfig)}
