from __future__ import annotations

import concurrent.futures
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles.services.reward.bounded import bounded
from miles.services.reward.math_answer import math_answer
from miles.types import Sample


def answer(response: str, label: str | None) -> Sample:
    return Sample(group_id=0, index=0, prompt="?", response=response, label=label)


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("The answer is $\\frac{1}{2}$.", "0.5"),
        ("so \\boxed{42}", "42"),
        ("so \\boxed{42}", "$42$"),
        ("x is \\boxed{x^2+2x+1}", "(x+1)^2"),
        ("It is 1,234.", "1234"),
        ("$\\sqrt{8}$", "2\\sqrt{2}"),
        ("$\\{1,2\\}$", "\\boxed{\\{2,1\\}}"),
        (r"\boxed{18.90}", r"\$18.90"),
        (r"\boxed{-\$32{,}348}", r"-\$32,348"),
        (r"\boxed{4}. Wait: \boxed{3}", "3"),
        (r"\boxed{4} or \boxed{3}", "3"),
        (r"\boxed{2} and \boxed{1}", "1,2"),
        (r"<think>\boxed{4}</think>The answer is 3.", "3"),
        (r"\boxed{\text{True}}", "true"),
        ("The answer is (B).", "B"),
        ("The correct option is B.", "B"),
        (r"\boxed{\sqrt{2}}", "\u221a2"),
        (r"\boxed{\varnothing}", r"\emptyset"),
        (r"\boxed{\textbf{(B)}\ 5}", "(B)"),
        ("The answer is Evelyn.", r"\text{Evelyn}"),
        (r"\boxed{x=3}", "#### 3"),
        (r"\boxed{1\times 10^{-5}}", "1e-05"),
        (r"\boxed{10^\circ}", "10"),
        (r"\boxed{(1,2]}", "(1, 2]"),
    ],
)
def test_equal_mathematics_scores_one(response: str, label: str) -> None:
    assert math_answer(answer(response, label)) == 1.0


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\dfrac{\sqrt{3}}2", r"\frac{\sqrt 3}{2}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        ("x^{2}", "x^2"),
        ("No Solution", "no solution"),
        ("5 PM", "5 pm"),
        ("**East**.", r"\text{East}"),
        ("2 million", "2000000"),
        ("2000000", "2 million"),
        ("18 eggs", "18"),
        ("50%", "0.5"),
        ("(b)", "(B)"),
        ("B. 1+x", "B. x+1"),
        ("B", "B. x+1"),
        ("E. coli", "E. coli"),
        ("3,4", r"\(3\) and \(4\)"),
        ("4, 3", "$$3$$ or $$4$$"),
        (r"\mathbb{R}^+", r"\mathbb{R}^{+}"),
    ],
)
def test_an_answer_equals_the_label_however_it_is_written(given: str, label: str) -> None:
    assert math_answer(answer(rf"so \boxed{{{given}}}.", label)) == 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{12}", r"\frac{11}{2}"),
        ("5", ".5"),
        ("3 1/2", "31/2"),
        ("x^{1}2", "x^{12}"),
        ("1 2", "12"),
        ("3 .5", "3.5"),
        ("n", "N"),
        ("AB", "ab"),
        ("3e", "3"),
        ("3/e", "3"),
        ("1/2e", "1/2"),
        ("1-", "1"),
        ("2 million", "2"),
        ("3 squared", "3"),
        ("5 factorial", "5"),
        ("101 binary", "101"),
        ("50%", "0.5%"),
        ("E. coli", "E. faecalis"),
        ("B. 12", "B. 13"),
        ("B. 12", "C. 12"),
    ],
)
def test_answers_that_only_look_alike_are_not_equal(one: str, other: str) -> None:
    assert math_answer(answer(rf"\boxed{{{one}}}", other)) == 0.0
    assert math_answer(answer(rf"\boxed{{{other}}}", one)) == 0.0


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("\\boxed{41}", "42"),
        ("", "42"),
        ("I do not know", "42"),
        ("$\\frac{1}{0}$", "1"),
        (r"\boxed{3}. No: \boxed{4}", "3"),
        (r"\boxed{3} but \boxed{3", "3"),
        (r"\boxed{}", "3"),
        (r"<think>\boxed{3}", "3"),
        (r"\boxed{0.0000002}", "0.0000001"),
        (r"\boxed{C}", "B"),
        (r"\boxed{[1,2]}", "(1,2]"),
        ("\\boxed{" + "9" * 10_000 + "}", "7"),
        ("\\boxed{" * 10_000, "7"),
    ],
)
def test_anything_else_scores_zero(response: str, label: str) -> None:
    assert math_answer(answer(response, label)) == 0.0


def test_it_works_on_other_threads_than_the_main_one() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        assert executor.submit(math_answer, answer("\\boxed{3}", "3")).result(timeout=60) == 1.0


@pytest.mark.parametrize("label", [None, "", "$$", "\\boxed{}"])
def test_it_refuses_a_label_without_an_expression(label: str | None) -> None:
    with pytest.raises(ValueError, match="label"):
        math_answer(answer("3", label))


@pytest.mark.parametrize(
    "call",
    [lambda: bool(9 ** (9**9)), lambda: bool(bytearray(8 << 30)), lambda: bool(1 // 0)],
    ids=["time", "memory", "error"],
)
def test_a_call_that_asks_for_too_much_or_fails_has_no_result(call: Callable[[], bool]) -> None:
    assert bounded(call, 1) is None
    assert bounded(lambda: True, 1) is True
    assert bounded(lambda: False, 1) is False


MATHS = st.lists(
    st.sampled_from([*"0123456789+-*/^_{}()[]$\\=<>,. xyπ%&", "\\frac", "\\boxed{", "\\sqrt", "\\text{", "}", "sin"]),
    max_size=20,
).map("".join)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.text(max_size=60), MATHS))
def test_any_response_is_scored_without_an_error(response: str) -> None:
    assert math_answer(answer(response, "7")) in (0.0, 1.0)
