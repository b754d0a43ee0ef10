"""Which reward service scores samples that choose none."""

from __future__ import annotations

from typing import Any

import pytest

from miles.config.sections.reward import RewardConfig


@pytest.mark.parametrize(
    ("settings", "addresses"),
    [
        ({"reward_service": ("mine=h:1",)}, {"default": "h:1", "mine": "h:1"}),
        ({"reward_service": ("mine=h:1",), "rm_type": "math"}, {"mine": "h:1"}),
        ({"reward_service": ("a=h:1", "b=h:2")}, {"a": "h:1", "b": "h:2"}),
        ({"reward_service": ("default=h:1", "b=h:2")}, {"default": "h:1", "b": "h:2"}),
    ],
)
def test_the_only_service_scores_everything(settings: dict[str, Any], addresses: dict[str, str]) -> None:
    assert RewardConfig(**settings).addresses_with_default() == addresses
