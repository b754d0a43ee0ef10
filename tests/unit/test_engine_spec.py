from __future__ import annotations

import typing

import pytest

from miles.config.sections.precision import PrecisionConfig
from miles.config.sections.rollout import RolloutConfig
from miles.engine_spec import ENGINE_SPECS, EngineName, engine_spec


def test_every_engine_that_a_job_can_name_is_described() -> None:
    named = typing.get_args(RolloutConfig.model_fields["rollout_backend"].annotation)
    assert set(named) == {"auto", *typing.get_args(EngineName)}
    assert set(typing.get_args(EngineName)) == set(ENGINE_SPECS)
    for name, spec in ENGINE_SPECS.items():
        assert engine_spec(name) is spec
        assert spec.name == name


def test_every_weight_format_is_known_and_every_engine_takes_weights_as_trained() -> None:
    known = set(typing.get_args(PrecisionConfig.model_fields["rollout_weight_format"].annotation))
    for spec in ENGINE_SPECS.values():
        assert "as_trained" in spec.weight_formats
        assert spec.weight_formats <= known


def test_an_unknown_engine_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="unknown rollout backend 'vllm': choose one of torch, sglang"):
        engine_spec("vllm")
