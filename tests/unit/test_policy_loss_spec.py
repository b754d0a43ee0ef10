from typing import get_args

import pytest
from config_cases import MINIMAL

from miles.algorithms import ESTIMATORS, POLICY_LOSSES
from miles.config import JobConfig
from miles.config.schema.catalog import catalog
from miles.policy_loss_spec import LOSS_OF_ESTIMATOR, POLICY_LOSS_SPECS, PolicyLossName


def test_every_name_is_a_registered_loss_of_the_same_kind() -> None:
    assert set(POLICY_LOSS_SPECS) == set(get_args(PolicyLossName))
    for name, spec in POLICY_LOSS_SPECS.items():
        assert POLICY_LOSSES[name].trust_region == spec.trust_region, name
    assert [name for name, spec in POLICY_LOSS_SPECS.items() if not spec.trust_region] == ["cispo"]


def test_names_of_settings_and_estimators_exist() -> None:
    for spec in POLICY_LOSS_SPECS.values():
        assert all(catalog()[key].section == "policy_loss" for key in spec.settings)
    assert all(name in ESTIMATORS and loss in POLICY_LOSSES for name, loss in LOSS_OF_ESTIMATOR.items())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("ppo_clip", 0.2, 0.2)),
        ({"advantage_estimator": "gspo"}, ("gspo", 0.2, 0.2)),
        ({"advantage_estimator": "dr_grpo", "eps_clip_high": 0.28}, ("dr_grpo", 0.2, 0.28)),
        ({"policy_loss_type": "dppo_kl"}, ("dppo_kl", 0.05, 0.05)),
        ({"policy_loss_type": "gmpo"}, ("gmpo", 0.4, 0.4)),
        ({"policy_loss_type": "luspo"}, ("luspo", 0.002, 0.0025)),
        ({"policy_loss_type": "luspo", "eps_clip": 0.01}, ("luspo", 0.01, 0.01)),
        ({"policy_loss_type": "luspo", "eps_clip_high": 0.01}, ("luspo", 0.002, 0.01)),
    ],
)
def test_a_loss_comes_with_its_papers_clip(given: dict[str, object], expected: tuple[str, float, float]) -> None:
    config = JobConfig.from_flat(MINIMAL | given)
    clip = config.algorithm.eps_clip, config.algorithm.eps_clip_high
    assert (config.policy_loss.policy_loss_type, *clip) == expected
