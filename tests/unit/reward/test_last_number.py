from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.answers.numbers import find_last_number
from miles.services.reward.exact_match import exact_match
from miles.services.reward.last_number import last_number
from miles.types import Sample


def answer(response: str, label: str | None) -> Sample:
    return Sample(group_id=0, index=0, prompt="?", response=response, label=label)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7", "7"),
        ("The answer is 7.", "7"),
        ("first 3, then 5", "5"),
        ("1,234,567 people", "1234567"),
        ("(1,2)", "2"),
        ("12,34", "34"),
        ("x = -4", "-4"),
        ("x = \N{MINUS SIGN}4", "-4"),
        ("10-4", "4"),
        ("(3)-4", "4"),
        ("3 - 4", "4"),
        ("+5", "5"),
        ("2.50 dollars", "2.5"),
        ("about .5", "0.5"),
        ("-.5", "-0.5"),
        ("1,000.25!", "1000.25"),
        ("version 1.2.3", "3"),
        ("007", "7"),
        ("$-1,500", "-1500"),
        ("**42**", "42"),
        (r"\boxed{42}", "42"),
        ("1e-5", "0.00001"),
        ("about 2.5E3.", "2500"),
        ("3e5x", "5"),
        ("-$5.", "-5"),
        ("12{,}345 and 12\u202f346", "12346"),
        ("1/2", "0.5"),
        ("-3/4.", "-0.75"),
        (r"-\frac{1}{4}", "-0.25"),
        ("2 1/2", "2.5"),
        ("on 3/4/2024", "2024"),
        ("1/0", "0"),
        ("8/2", "2"),
        (r"\frac{8}{2}", "2"),
        ("42 m2", "42"),
    ],
)
def test_the_last_number_of_free_text(text: str, number: str) -> None:
    assert find_last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no number", "- + . ,", "٣"])
def test_text_without_digits_has_no_number(text: str) -> None:
    assert find_last_number(text) is None


@given(st.text())
def test_any_text_is_searched_without_an_error(text: str) -> None:
    find_last_number(text)


@given(st.text(alphabet="0123456789.,-+ \n", max_size=200))
def test_any_jumble_of_digits_and_signs_is_searched_without_an_error(text: str) -> None:
    number = find_last_number(text)
    assert (number is None) == (not any(character.isdigit() for character in text))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.text(alphabet="abc \n", max_size=20))
def test_a_number_behind_any_words_is_found_exactly(number: Decimal, words: str) -> None:
    assert find_last_number(f"{words} {number:f}") == number
    assert find_last_number(f"{words} {number:,f}.") == number


@given(st.text(), st.integers())
def test_last_number_scores_any_response(response: str, label: int) -> None:
    assert last_number(answer(response, str(label))) in (0.0, 1.0)


def test_last_number_compares_as_numbers() -> None:
    assert last_number(answer("it is 3.0", "3")) == 1.0
    assert last_number(answer("it is 1,000", "1000")) == 1.0
    assert last_number(answer("3 is not 4", "3")) == 0.0
    assert last_number(answer("none", "3")) == 0.0


def test_rewards_read_the_answer_behind_the_thinking() -> None:
    assert last_number(answer("<think>so 3</think>It is 4.", "4")) == 1.0
    assert last_number(answer("It is 4.</think>It is 3.", "4")) == 0.0
    assert last_number(answer("<think>so 4", "4")) == 0.0
    assert exact_match(answer("<think>so 3</think>\n4", "4")) == 1.0
    assert exact_match(answer("<think>4", "4")) == 0.0


@pytest.mark.parametrize("label", [None, "", "seven", "3 or 4"])
def test_last_number_refuses_a_label_that_is_no_number(label: str | None) -> None:
    with pytest.raises(ValueError, match="label"):
        last_number(answer("3", label))


@given(st.text(), st.text(alphabet=" \t\n"))
def test_exact_match_ignores_white_space_around(text: str, space: str) -> None:
    assert exact_match(answer(space + text + space, text)) == 1.0
    assert exact_match(answer(text + "x", text)) == 0.0


def test_exact_match_needs_a_label() -> None:
    with pytest.raises(ValueError, match="--label-key"):
        exact_match(answer("3", None))
