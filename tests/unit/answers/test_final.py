"""Which part of a response is its answer, and its boxes."""

from __future__ import annotations

import pytest

from miles.answers.boxes import last_boxes, without_boxes
from miles.answers.final import final_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("42", "42"),
        ("<think>so 41</think>42", "42"),
        ("so 41</think>42", "42"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>never ended 42", ""),
        ("a</think>42<think>again", "42"),
        ("[THINK]41[/THINK]42", "42"),
        ("<|channel|>analysis<|message|>41<|end|><|channel|>final<|message|>42", "42"),
    ],
)
def test_the_answer_follows_the_thinking(response: str, answer: str) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"\boxed{3}", ["3"]),
        (r"\boxed{4}. No: \boxed{3}", ["3"]),
        (r"\boxed{1} and $\boxed{2}$", ["1", "2"]),
        (r"\boxed{1},\boxed{2} or \boxed{3}", ["1", "2", "3"]),
        (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
        (r"\boxed{\boxed{3}}", ["3"]),
        (r"\boxed{x=\boxed{3}}", ["x=3"]),
        (r"\boxed{\{1\}}", [r"\{1\}"]),
        (r"\boxed{3} as in \boxed{}", ["3"]),
        (r"\fbox{3}", ["3"]),
        (r"\boxed 3.", ["3"]),
        ("no box", []),
        (r"\boxed{}", []),
        (r"\boxed{3} no \boxed{4", None),
        (r"\boxed{\frac{1}{2}", None),
    ],
)
def test_the_last_box_counts(text: str, boxes: list[str] | None) -> None:
    assert last_boxes(text) == boxes


def test_a_gap_of_any_length_between_boxes_is_read_in_linear_time() -> None:
    gap = " $" * 200_000  # a pattern that goes back in it takes hours
    assert last_boxes(rf"\boxed{{1}}{gap}\boxed{{2}}") == ["1", "2"]
    assert last_boxes(rf"\boxed{{1}}{gap}x\boxed{{2}}") == ["2"]


def test_boxes_of_any_depth_and_number_are_unpacked() -> None:
    depth = 5000
    assert last_boxes("\\boxed{" * depth + "3" + "}" * depth) == ["3"]
    assert last_boxes("\\boxed{" * depth + "3") is None
    assert without_boxes(r"a \boxed{b \boxed{c}} \boxed{d") == r"a b c \boxed{d"
