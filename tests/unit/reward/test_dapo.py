from __future__ import annotations

import pytest

from miles.services.reward.dapo import dapo
from miles.types import Sample


def score(response: str, label: str | None = "34") -> dict[str, float]:
    return dapo(Sample(group_id=0, index=0, prompt="?", response=response, label=label))


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("So it is.\nAnswer: 34", True),
        ("Answer: $34$", True),
        (r"answer : \boxed{34}", True),
        ("**Answer: 34.**", True),
        ("Answer: 12\nNo.\nAnswer: 34", True),
        ("Answer: 34\nNo.\nAnswer: 12", False),
        (r"\boxed{34}", False),
        ("Answer: 34" + " and so on" * 40, False),
        ("", False),
    ],
)
def test_the_answer_that_is_stated_last_counts(response: str, right: bool) -> None:
    assert score(response) == ({"score": 1.0, "acc": 1.0} if right else {"score": -1.0, "acc": 0.0})


def test_an_empty_label_is_refused() -> None:
    with pytest.raises(ValueError, match="the reward dapo compares"):
        score("Answer: 3", r"$\boxed{}$")
