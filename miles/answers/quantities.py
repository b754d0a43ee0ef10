"""Numbers with what people write around them: currency, percent signs, units, separators of thousands."""

from __future__ import annotations

import dataclasses
import re
from decimal import Decimal
from fractions import Fraction

from miles.answers.numbers import find_numbers

_TOLERANCE = Fraction(1, 10**6)
_CURRENCY = re.compile(r"\\?\$|[€£¥]")
_UNIT = re.compile(r"(?:\\text\s*\{\s*([A-Za-z ]+)\}|(?<=[\s\d%])\s*([A-Za-z]{3,}(?: [A-Za-z]+)*))\.?$")
_NO_UNITS = frozenset({"alpha", "beta", "gamma", "delta", "theta", "lambda", "sigma", "omega", "phi", "psi", "tau"})
_PERCENT = re.compile(r"\\?%$|(?i:\s*per ?cent)$")
_SPACED = re.compile(r"[-+\u2212\u2013]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_POINTED = re.compile(r"[-+\u2212\u2013]?\d{1,3}(?:\.\d{3}){2,}")
_NUMERIC = re.compile(r"[-+\u2212\u2013]?[\d.][\d.,/eE+\-\u2212 ]*|-?\\[dtc]?frac\W?\d\W*\d\W?")


@dataclasses.dataclass(frozen=True, slots=True)
class Quantity:
    """A number and its unit."""

    values: tuple[Fraction, ...]
    """What the number may mean: 50% is 50 or 0.5."""
    unit: str = ""

    def equals(self, other: Quantity) -> bool:
        """Whether the numbers are equal: exactly for integers, else to six digits."""
        return any(_equal(mine, theirs) for mine in self.values for theirs in other.values)

    def comparable(self, other: Quantity) -> bool:
        """Whether the numbers decide, as no units speak against it."""
        return not self.unit or not other.unit or self.unit == other.unit


def read_quantity(text: str) -> Quantity | None:
    """Return the quantity that the whole text is; None when it is anything else, such as an expression."""
    text = _CURRENCY.sub("", text).strip().removesuffix(".").strip()
    unit = ""
    if (found := _UNIT.search(text)) and not _PERCENT.search(text):
        unit = (found[1] or found[2]).strip().casefold().removesuffix("s")
        if unit in _NO_UNITS:
            return None
        text = text[: found.start()].strip()
    percent = _PERCENT.search(text)
    text = (text[: percent.start()] if percent else text).strip()
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    elif _POINTED.fullmatch(text):
        text = text.replace(".", "")
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,;!]|[\u2009\u202f\u00a0'\u2019])(?=\d{3}(?!\d))", ",", text)
    if not _NUMERIC.fullmatch(text) or len(numbers := find_numbers(text)) != 1:
        return None
    value = Fraction(numbers[0])
    return Quantity((value, value / 100) if percent else (value,), unit)


def _equal(wanted: Fraction, given: Fraction) -> bool:
    if wanted.denominator == given.denominator == 1:
        return wanted == given
    return abs(wanted - given) <= _TOLERANCE * min(Fraction(1), abs(wanted))


def plain_decimal(number: Decimal) -> str:
    """Write a number without an exponent and without trailing zeros: 0.00001, 18.5, 20000000000000000."""
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text
