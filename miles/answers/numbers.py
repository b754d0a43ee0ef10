"""Numbers as people write them, read exactly."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

Exact = Decimal | Fraction

_SIGN = r"(?: (?<![\w)\].,]) [-+\u2212\u2013] )?"  # unless it joins two terms as in 3-4
_INTEGER = r"(?: [0-9]{1,3} (?: , [0-9]{3} )+ (?![0-9]) | [0-9]+ )"  # commas separate thousands: 1,234 but not 1,2
_NUMBER = re.compile(
    rf"""
    (?P<sign> {_SIGN} )
    (?: (?<! [/\d.] ) (?: (?P<whole> [0-9]+ ) [ ] )?             # 1/2, or 2 1/2, but not a date
        (?P<top> {_INTEGER} ) / (?P<bottom> [0-9]+ ) (?! [\d/] | \.\d )
      | (?P<decimal> (?: {_INTEGER} (?: \. [0-9]+ )?             # a full stop alone ends the sentence
          | (?<! [\w.] ) \. [0-9]+ )                             # .5
        (?: [eE] [-+\u2212]? [0-9]{{1,4}} (?! \w ) )? ) )          # 1e-5
    """,
    re.VERBOSE,
)
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\[,;!]|[\u2009\u202f\u00a0'\u2019])(?=\d{3}(?!\d))")
_SIGN_OF_MONEY = re.compile(r"(?<=[-+\u2212\u2013])\s?(?:\\?\$|[€£¥])\s?(?=[\d.])")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
_POWER_OF_UNIT = re.compile(r"(?<![A-Za-z])([cdkm]?m|in|ft|yd|mi)\^?\{?[23]\}?(?![\w])")


def find_last_number(text: str) -> Exact | None:
    """Return the last number in free text, exactly; None when there is none.

    Numbers are the digits 0-9 with an optional sign, separators of thousands (1,234 but not 1,2), decimals (2.50, .5)
    and an exponent (1e-5), or fractions in lowest terms (1/2, 2 1/2). A minus sign counts only where a number begins:
    "3-4" ends with 4, "= -4" with -4. Expressions are not evaluated: "10^5" ends with 5, "8/2" with 2.
    """
    numbers = find_numbers(text, divide=False)
    return numbers[-1] if numbers else None


def find_numbers(text: str, *, divide: bool = True) -> list[Exact]:
    """Return all numbers in free text, in order; with `divide`, fractions need not be in lowest terms."""
    return [number for found in _NUMBER.finditer(_plainly_written(text)) for number in _read(found, divide)]


def read_number(text: str) -> Exact | None:
    """Return the number that the whole text is; None when anything else is in it."""
    found = _NUMBER.fullmatch(_plainly_written(text))
    numbers = _read(found, divide=True) if found else []
    return numbers[0] if len(numbers) == 1 else None


def _plainly_written(text: str) -> str:
    """Return the text with fractions as 1/2, commas between thousands, and without what hides a number or looks so."""
    text = _FRACTION.sub(r"\1\3/\2\4", re.sub(r"(?<=\d)\s*(?=\\[dtc]?frac)", " ", text))
    return _THOUSANDS.sub(",", _SIGN_OF_MONEY.sub("", _POWER_OF_UNIT.sub(r"\1", text)))


def _read(found: re.Match[str], divide: bool) -> list[Exact]:
    if found["decimal"] is not None:
        return [Decimal(_plain(found["sign"] + found["decimal"]))]
    sign = -1 if _plain(found["sign"]) == "-" else 1
    top, bottom = int(Decimal(_plain(found["top"]))), int(Decimal(found["bottom"]))
    if bottom == 0 or not (divide or (bottom > 1 and math.gcd(top, bottom) == 1)):
        whole = [] if found["whole"] is None else [Decimal(found["whole"])]
        return [*whole, Decimal(top if whole else sign * top), Decimal(bottom)]
    if found["whole"] is None:
        return [sign * Fraction(top, bottom)]
    before = int(Decimal(found["whole"]))
    if top < bottom:
        return [sign * (before + Fraction(top, bottom))]
    return [Decimal(sign * before), Fraction(top, bottom)]


def _plain(text: str) -> str:
    return text.replace(",", "").replace("\u2212", "-").replace("\u2013", "-")
