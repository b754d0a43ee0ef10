"""Labels as data sets write them."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest

from miles.answers.labels import label_answer, label_fault, label_number
from miles.answers.quantities import plain_decimal, read_quantity


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        ("18", "18"),
        ("She has 3.\n#### 18", "18"),
        (r"so $x = \boxed{\frac12}$.", r"\frac12"),
        ("$18$", "18"),
        ("$$x$$", "x"),
        (r"\(x\)", "x"),
        (r"\[x\]", "x"),
        ("$18.90", "$18.90"),
        (r"$1$ and $2$", r"$1$ and $2$"),
        ("$$3$$ or $$4$$", "$$3$$ or $$4$$"),
        (r"\(3\) and \(4\)", r"\(3\) and \(4\)"),
        (r"\[3\], \[4\]", r"\[3\], \[4\]"),
        (r"$$\(3\)$$", "3"),
        (r"\boxed{}", ""),
        ("$$", ""),
    ],
)
def test_the_answer_in_a_label_is_found(label: str, answer: str) -> None:
    assert label_answer(label) == answer


@pytest.mark.parametrize(
    ("label", "number"),
    [
        ("18", Decimal(18)),
        ("#### 1,234", Decimal(1234)),
        ("1e-05", Decimal("0.00001")),
        ("-$5", Decimal(-5)),
        ("18 dollars", Decimal(18)),
        ("50%", Decimal(50)),
        (r"$\frac{1}{2}$", Fraction(1, 2)),
        ("x = 5", Decimal(5)),
        ("3 or 4", None),
        ("seven", None),
    ],
)
def test_a_label_of_last_number_holds_one_number(label: str, number: Decimal | Fraction | None) -> None:
    assert label_number(label) == number


@pytest.mark.parametrize("reward", ["exact_match", "last_number", "math", "deepscaler", "dapo"])
@pytest.mark.parametrize("label", [None, "", " \n"])
def test_a_built_in_reward_needs_a_label(reward: str, label: str | None) -> None:
    assert f"there is no label, with which the reward {reward} compares" in str(label_fault(reward, label))


def test_labels_that_a_reward_cannot_read_are_faults() -> None:
    assert "is not one number" in str(label_fault("last_number", "seven"))
    assert "holds no answer" in str(label_fault("math", r"$\boxed{}$"))
    assert label_fault("math", "seven") is None
    assert label_fault("exact_match", "$$") is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12,345", "12345"),
        ("12 345", "12345"),
        ("12\u202f345", "12345"),
        (r"12\,345", "12{,}345"),
        ("1.234.567", "1234567"),
        (r"\$18.90", "18.9"),
        ("50%", "50"),
        (r"50\%", "0.5"),
        ("3 1/2", "3.5"),
        ("\u22123", "-3"),
        ("2e16", "20000000000000000"),
        ("18 dollars", "18"),
        (r"5\text{ cm}", "5"),
        ("3.14159265", "3.1415927"),
        ("2 million", "2000000"),
        ("2.5 billion people", "2500000000"),
        ("2 hundred thousand", "200,000"),
        (r"3 \text{ dozen}", "36"),
        ("3,", "3"),
        (r"3\frac{1}{2}", "3.5"),
        ("50%", "50 percent"),
    ],
)
def test_numbers_are_equal_however_they_are_written(one: str, other: str) -> None:
    left, right = read_quantity(one), read_quantity(other)
    assert left is not None
    assert right is not None
    assert left.equals(right)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("10000000", "10000001"),
        ("1e-7", "2e-7"),
        ("18.90", "18.91"),
        ("5", "-5"),
        ("50%", "0.5%"),
        ("5", ".5"),
        ("3 1/2", "31/2"),
        ("2 million", "2"),
    ],
)
def test_other_numbers_are_not_equal(one: str, other: str) -> None:
    left, right = read_quantity(one), read_quantity(other)
    assert left is not None
    assert right is not None
    assert not left.equals(right)


@pytest.mark.parametrize(
    "text",
    [
        "x+1",
        "2 theta",
        r"2\pi",
        "1,2",
        "10^6",
        "(3)",
        "",
        "3e",
        "3/e",
        "1/2e",
        "1-",
        "1 2",
        "3 squared",
        "5 factorial",
        "101 binary",
        "3 halves",
        "5 or more",
        "3 plus two",
        "million",
        "9" * 3000 + " million",
    ],
)
def test_what_is_no_number_is_not_read_as_one(text: str) -> None:
    assert read_quantity(text) is None


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("1E-5", "0.00001"),
        ("2E+16", "20000000000000000"),
        ("18.50", "18.5"),
        ("100", "100"),
        ("-0.0", "0"),
        ("-1.5", "-1.5"),
    ],
)
def test_numbers_are_written_in_full(number: str, text: str) -> None:
    assert plain_decimal(Decimal(number)) == text
