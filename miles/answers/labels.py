"""What the label of a row says, and whether a built-in reward can compare with it."""

from __future__ import annotations

import re

from miles.answers.boxes import last_boxes, without_boxes
from miles.answers.numbers import Exact, find_numbers

_WORKED_SOLUTION = "####"
"""GSM8K's labels are a solution, these marks, and the answer."""
_MATH = re.compile(r"\$\$((?:(?!\$\$).)*)\$\$|\$([^$]*)\$|\\\(((?:(?!\\\)).)*)\\\)|\\\[((?:(?!\\\]).)*)\\\]", re.DOTALL)
"""One pair of delimiters around everything: not `$$3$$ or $$4$$`."""


def label_answer(label: str) -> str:
    r"""Return the answer in a label: of `\boxed{3}`, `$3$` or a worked solution that ends in `#### 3` it is 3."""
    answer = label.rpartition(_WORKED_SOLUTION)[2].strip()
    boxes = last_boxes(answer)
    return bare_math(", ".join(boxes) if boxes else without_boxes(answer))


def bare_math(text: str) -> str:
    """Return the text without the dollar signs or brackets of mathematics around it."""
    text = text.strip()
    while found := _MATH.fullmatch(text):
        inner = next((group for group in found.groups() if group is not None), "").strip()
        if inner.endswith("\\"):  # $18.90\$ is no pair
            break
        text = inner
    return text


def label_number(label: str) -> Exact | None:
    """Return the number that a label of `last_number` stands for; None when it holds no number, or several."""
    numbers = find_numbers(label_answer(label))
    return numbers[0] if len(numbers) == 1 else None


def label_fault(reward: str, label: str | None) -> str | None:
    """Return why a built-in reward cannot compare with a label, in words; None when it can."""
    if label is None or not label.strip():
        return f"there is no label, with which the reward {reward} compares"
    if reward == "last_number" and label_number(label) is None:
        return f"the label {label!r:.200} is not one number, with which the reward last_number compares"
    if reward in ("math", "deepscaler", "dapo") and not label_answer(label):
        return f"the label {label!r:.200} holds no answer, with which the reward {reward} compares"
    return None
