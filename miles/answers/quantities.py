"""Numbers with what people write around them: currency, percent signs, units, separators of thousands."""

from __future__ import annotations

import dataclasses
import re
from decimal import Decimal
from fractions import Fraction

from miles.answers.numbers import read_number

_TOLERANCE = Fraction(1, 10**6)
_LONGEST = 2000
"""Characters of a text that may be a quantity."""
_CURRENCY = re.compile(r"\\?\$|[€£¥]")
_WORDS = re.compile(r"(?:\\text\s*\{\s*([A-Za-z ]+)\}|(?<=[\s\d%])([A-Za-z]{3,}(?: [A-Za-z]+)*+))$")
_MULTIPLES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_OPERATORS = """
alpha beta gamma delta epsilon theta lambda sigma omega phi psi tau rho eta zeta kappa
sin cos tan cot sec csc sinh cosh tanh log exp sqrt root infinity imaginary
plus minus times over divided multiplied choose mod modulo power raised squared cubed factorial halved doubled tripled
binary ternary octal decimal hex hexadecimal base percent
half halve third quarter fourth fifth sixth seventh eighth ninth tenth twelfth hundredth thousandth millionth billionth
zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty quadrillion score gross
pair couple and or not to than more less least most about if when where unless except
"""
_NO_UNITS = frozenset(_OPERATORS.split())
"""Words behind a number, in the singular, that make it another number, several, or an expression."""
_PERCENT = re.compile(r"\\?%$|(?i:per ?cent)$")
_SPACED = re.compile(r"[-+\u2212\u2013]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_POINTED = re.compile(r"[-+\u2212\u2013]?\d{1,3}(?:\.\d{3}){2,}")


@dataclasses.dataclass(frozen=True, slots=True)
class Quantity:
    """A number and its unit."""

    value: Fraction
    unit: str = ""
    percent: bool = False
    """Whether a percent sign follows: the value of 50% is 50, and beside a plain number it may mean 0.5."""

    def equals(self, other: Quantity) -> bool:
        """Whether the numbers are equal: exactly for integers, else to six digits."""
        if self.percent == other.percent:
            return _equal(self.value, other.value)
        return any(_equal(mine, theirs) for mine in self._meanings() for theirs in other._meanings())

    def comparable(self, other: Quantity) -> bool:
        """Whether the numbers decide, as no units speak against it."""
        return not self.unit or not other.unit or self.unit == other.unit

    def _meanings(self) -> tuple[Fraction, ...]:
        return (self.value, self.value / 100) if self.percent else (self.value,)


def read_quantity(text: str) -> Quantity | None:
    """Return the quantity that the whole text is; None when it is anything else, such as an expression.

    Words behind the number are its unit, unless they multiply it ("2 million") or make it another one ("3 squared").
    """
    if len(text) > _LONGEST:
        return None
    text = re.sub(r"[ \t\r\n]+", " ", _CURRENCY.sub("", text)).strip()
    text = (text[:-1] if text.endswith((".", ",")) else text).rstrip()
    words: list[str] = []
    if not _PERCENT.search(text) and (found := _WORDS.search(text)):
        words = (found[1] or found[2]).casefold().split()
        text = text[: found.start()].rstrip()
    multiple = 1
    while words and (times := _MULTIPLES.get(words[0].removesuffix("s"))):
        multiple *= times
        words = words[1:]
    if any(word in _NO_UNITS or word.removesuffix("s") in _NO_UNITS | _MULTIPLES.keys() for word in words):
        return None
    percent = _PERCENT.search(text)
    number = read_number(_joined_thousands(text[: percent.start()].rstrip() if percent else text))
    if number is None:
        return None
    return Quantity(Fraction(number) * multiple, " ".join(words).removesuffix("s"), percent is not None)


def _joined_thousands(text: str) -> str:
    if _SPACED.fullmatch(text):
        return text.replace(" ", "")
    return text.replace(".", "") if _POINTED.fullmatch(text) else text


def _equal(wanted: Fraction, given: Fraction) -> bool:
    if wanted.denominator == given.denominator == 1:
        return wanted == given
    return abs(wanted - given) <= _TOLERANCE * min(Fraction(1), abs(wanted))


def plain_decimal(number: Decimal) -> str:
    """Write a number without an exponent and without trailing zeros: 0.00001, 18.5, 20000000000000000."""
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text
