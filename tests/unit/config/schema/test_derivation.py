"""Derived settings: the four batch sizes, and the staleness bound."""

from __future__ import annotations

from typing import Any

import pytest
from config_cases import BATCH_SIZES, MINIMAL, faults_for
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.config import ConfigError, JobConfig

REST = {key: value for key, value in MINIMAL.items() if key not in BATCH_SIZES}


def sizes(**given: int) -> tuple[int, ...]:
    config = JobConfig.from_flat(REST | {"advantage_estimator": "reinforce_plus_plus"} | given)
    return (
        config.data.rollout_batch_size,
        config.data.n_samples_per_prompt,
        config.train.global_batch_size,
        config.train.num_steps_per_rollout,
    )


@settings(deadline=None)
@given(st.integers(2, 50), st.integers(1, 50), st.integers(1, 20), st.sampled_from(BATCH_SIZES))
def test_any_three_give_the_fourth(samples: int, batch: int, steps: int, missing: str) -> None:
    whole = dict(zip(BATCH_SIZES, (batch * steps, samples, batch * samples, steps), strict=True))
    three = {key: value for key, value in whole.items() if key != missing}
    assert sizes(**three) == tuple(whole.values())


def test_without_steps_and_batch_there_is_one_step() -> None:
    assert sizes(rollout_batch_size=6, n_samples_per_prompt=4) == (6, 4, 24, 1)


def test_one_response_a_prompt_is_assumed() -> None:
    assert sizes(rollout_batch_size=6, num_steps_per_rollout=2) == (6, 1, 3, 2)
    assert sizes(global_batch_size=6, num_steps_per_rollout=2) == (12, 1, 6, 2)


def test_four_that_disagree_are_refused_in_full() -> None:
    assert faults_for(rollout_batch_size=12, n_samples_per_prompt=8, global_batch_size=64, num_steps_per_rollout=2) == [
        "rollout_batch_size × n_samples_per_prompt = 96, but global_batch_size × num_steps_per_rollout = 128; "
        "set one of them to match"
    ]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (
            {"rollout_batch_size": 12, "n_samples_per_prompt": 8, "global_batch_size": 40},
            "rollout_batch_size × n_samples_per_prompt = 96, but global_batch_size = 40 does not divide it; "
            "set global_batch_size to 32 or 48",
        ),
        (
            {"rollout_batch_size": 12, "n_samples_per_prompt": 8, "num_steps_per_rollout": 5},
            "rollout_batch_size × n_samples_per_prompt = 96, but num_steps_per_rollout = 5 does not divide it; "
            "set num_steps_per_rollout to 4 or 6",
        ),
        (
            {"rollout_batch_size": 12, "n_samples_per_prompt": 8, "global_batch_size": 200},
            "rollout_batch_size × n_samples_per_prompt = 96, but global_batch_size = 200 does not divide it; "
            "set global_batch_size to 96",
        ),
        (
            {"rollout_batch_size": 7, "global_batch_size": 32, "num_steps_per_rollout": 2},
            "global_batch_size × num_steps_per_rollout = 64, but rollout_batch_size = 7 does not divide it; "
            "set rollout_batch_size to 4 or 8",
        ),
        (
            {"n_samples_per_prompt": 7, "global_batch_size": 32, "num_steps_per_rollout": 2},
            "global_batch_size × num_steps_per_rollout = 64, but n_samples_per_prompt = 7 does not divide it; "
            "set n_samples_per_prompt to 4 or 8",
        ),
        (
            {"global_batch_size": 32, "n_samples_per_prompt": 2},
            "rollout_batch_size is not set, and a rollout needs a size; set it to the prompts per rollout",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused(given: dict[str, int], fault: str) -> None:
    with pytest.raises(ConfigError) as error:
        JobConfig.from_flat(REST | given)
    assert str(error.value.faults[0]) == fault
    assert len(error.value.faults) == 1


def test_a_huge_product_is_refused_quickly() -> None:
    (fault,) = faults_for(rollout_batch_size=10**9 + 7, n_samples_per_prompt=10**6 + 3, global_batch_size=2**40)
    assert fault.endswith("global_batch_size = 1099511627776 does not divide it; choose one that does")


@pytest.mark.parametrize(
    ("given", "staleness"),
    [
        ({}, 0),
        ({"max_weight_staleness": 2}, 2),
        ({"over_sampling_batch_size": 8}, 0),
        ({"over_sampling_batch_size": 9}, 1),
        ({"over_sampling_batch_size": 17}, 2),
        ({"over_sampling_batch_size": 9, "max_weight_staleness": 3}, 3),
        ({"update_weights_interval": 3}, 2),
        ({"partial_rollout": True}, 1),
    ],
)
def test_the_bound_is_the_smallest_that_the_rest_needs(given: dict[str, Any], staleness: int) -> None:
    assert JobConfig.from_flat(MINIMAL | given).rollout.max_weight_staleness == staleness


def test_a_recipe_may_leave_the_sizes_of_a_batch_and_of_responses_out() -> None:
    assert sizes() == (32, 1, 32, 1)
    config = JobConfig.from_flat(REST | {"advantage_estimator": "grpo", "rollout_max_response_len": None})
    assert (config.data.rollout_batch_size, config.data.n_samples_per_prompt) == (32, 8)
    assert config.rollout.rollout_max_response_len == 8192
    config = JobConfig.from_flat(MINIMAL | {"rollout_max_response_len": None, "rollout_max_context_len": 64})
    assert config.rollout.rollout_max_response_len is None


@pytest.mark.parametrize(
    ("given", "trainer", "engine"),
    [
        ({}, "fsdp", "torch"),
        ({"tensor_model_parallel_size": 2}, "megatron", "torch"),
        ({"tensor_model_parallel_size": 1, "sequence_parallel": False, "recompute_granularity": None}, "fsdp", "torch"),
        ({"expert_tensor_parallel_size": 1}, "fsdp", "torch"),
        ({"mtp_num_layers": 1}, "megatron", "torch"),
        ({"rollout_num_gpus": 8}, "fsdp", "sglang"),
        ({"rollout_num_gpus_per_engine": 1}, "fsdp", "torch"),
        ({"sglang_mem_fraction_static": 0.5}, "fsdp", "sglang"),
        ({"offload_rollout": False}, "fsdp", "torch"),
    ],
)
def test_settings_that_one_backend_has_choose_it(given: dict[str, Any], trainer: str, engine: str) -> None:
    config = JobConfig.from_flat(MINIMAL | given)
    assert (config.train.train_backend, config.rollout.rollout_backend) == (trainer, engine)
    assert JobConfig.from_flat(config.to_flat()) == config


def test_experts_and_tensor_parallelism_bring_sequence_parallelism() -> None:
    both = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
    assert JobConfig.from_flat(MINIMAL | both).megatron.sequence_parallel
    assert not JobConfig.from_flat(MINIMAL | both | {"sequence_parallel": False}).megatron.sequence_parallel
    assert not JobConfig.from_flat(MINIMAL | {"tensor_model_parallel_size": 2}).megatron.sequence_parallel


@pytest.mark.parametrize(
    ("given", "gpus"),
    [
        ({}, 8),
        ({"rollout_num_gpus_per_engine": 2}, 8),
        ({"rollout_num_gpus_per_engine": 3}, 6),
        ({"rollout_num_gpus": 4}, 4),
        ({"rollout_num_gpus": 16}, 8),
        ({"rollout_num_gpus_per_engine": 16}, None),
        ({"rollout_num_workers": 4, "rollout_num_gpus_per_engine": 2}, 8),
        ({"actor_num_nodes": 2, "host": "10.0.0.1"}, None),
        ({"rollout_external_engine_addrs": ["a:1"]}, None),
        ({"device": "cpu"}, None),
        ({"colocate": False}, None),
    ],
)
def test_engines_that_take_turns_have_the_trainers_gpus(given: dict[str, Any], gpus: int | None) -> None:
    shared: dict[str, Any] = {"colocate": True, "device": "cuda", "actor_num_gpus_per_node": 8, "global_batch_size": 16}
    config = JobConfig.from_flat(MINIMAL | {"rollout_backend": "sglang"} | shared | given)
    assert config.rollout.rollout_num_gpus == gpus
    assert JobConfig.from_flat(config.to_flat()) == config


def test_other_names_of_a_value_set_it() -> None:
    config = JobConfig.from_flat(
        MINIMAL | {"bf16": True, "use_tis": True, "tis_threshold": 0.9, "use_flash_attn": True}
    )
    assert (config.train.train_dtype, config.algorithm.tis_clip) == ("bfloat16", 0.9)
    assert (config.megatron.attention_backend, config.train.train_backend) == ("flash", "megatron")
    assert JobConfig.from_flat(config.to_flat()) == config
