"""What the job's flags mean for a training step."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from trainer_cases import job_config

from miles.services.trainer.step import algorithm_options

MEGATRON: dict[str, Any] = {"train_backend": "megatron", "share_prompts": False}


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({}, True),
        (MEGATRON, True),
        ({"advantage_estimator": "ppo"}, False),
        ({"use_kl_loss": True, "kl_loss_coef": 0.1}, False),
        ({"use_kl_loss": True}, True),
        ({"policy_loss_type": "sapo"}, True),
        ({"policy_loss_type": "dro", "dro_beta": 0.1}, False),
        ({"advantage_estimator": "maxrl"}, True),
        ({"advantage_estimator": "optimal_token_baseline"}, False),
        ({"echo_loss_coef": 0.05}, False),
        (MEGATRON | {"mtp_num_layers": 1}, True),
        (MEGATRON | {"mtp_num_layers": 1, "enable_mtp_training": True}, False),
        (MEGATRON | {"moe_aux_loss_coeff": 0.01}, False),
    ],
)
def test_samples_without_advantage_are_idle_when_nothing_else_learns_from_them(
    tmp_path: pathlib.Path, changes: dict[str, Any], idle: bool
) -> None:
    assert algorithm_options.zero_reward_is_zero_gradient(job_config(tmp_path, **changes)) is idle
