from __future__ import annotations

import pytest

from miles.services.reward.deepscaler import deepscaler
from miles.types import Sample


def score(response: str, label: str | None = "0.5") -> float:
    return deepscaler(Sample(group_id=0, index=0, prompt="?", response=response, label=label))


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"Let me see.</think>It is \boxed{\frac{1}{2}}.", True),
        (r"<think>\boxed{3}</think>\boxed{0.5}", True),
        (r"###Response \boxed{1/2}", True),
        (r"a</think>b</think>\boxed{0.50}", True),
        (r"\boxed{0.5}", False),  # never said that its thinking ended
        (r"<think>\boxed{0.5}", False),
        ("thought</think>It is 0.5.", False),
        (r"thought \boxed{0.5}</think>It is \boxed{0.6}", False),
        (r"thought</think>\boxed{0.5", False),
        ("", False),
    ],
)
def test_the_last_box_behind_the_thinking_counts(response: str, right: bool) -> None:
    assert score(response) == float(right)


def test_a_label_may_be_a_worked_solution() -> None:
    assert score(r"</think>\boxed{18}", "She has 3.\n#### 18") == 1.0


def test_an_empty_label_is_refused() -> None:
    with pytest.raises(ValueError, match="the reward deepscaler compares"):
        score(r"</think>\boxed{18}", r"$\boxed{}$")
