"""Comparison of mathematical expressions by math-verify, without its timeouts: for `bounded` calls."""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from typing import Any

import math_verify

from miles.answers.quantities import plain_decimal

_EXPONENT = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?[eE][-+]?\d{1,2})(?!\w)")
_ROOT = re.compile(r"\u221a\s*([0-9]+|[A-Za-z])")
_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|\\[,;!]|[\u2009\u202f\u00a0])(?=\d{3}(?!\d))")

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the timeouts that are off on purpose


def equal(wanted: str, given: str) -> bool:
    """Whether math-verify finds two pieces of LaTeX or plain expressions equal."""
    return bool(math_verify.verify(_parse(_in_math(wanted)), _parse(_in_math(given)), timeout_seconds=None))


def found_in(wanted: str, text: str) -> bool:
    """Whether the answer that math-verify finds in free text equals a piece of LaTeX or a plain expression."""
    return bool(math_verify.verify(_parse(_in_math(wanted)), _parse(_clean(text)), timeout_seconds=None))


def _parse(text: str) -> list[Any]:
    return list(math_verify.parse(text, parsing_timeout=None))


def _in_math(text: str) -> str:
    return f"${_clean(text).replace('$', ' ')}$".replace("\n", " ")


def _clean(text: str) -> str:
    """Take away what math-verify misreads: escaped dollar signs, thin spaces of thousands, √2, exponents like 1e-5."""
    text = _ROOT.sub(r"\\sqrt{\1}", _SEPARATOR.sub("", text.replace("\\$", "")))
    return _EXPONENT.sub(lambda found: plain_decimal(Decimal(found[1])), text)


for _left, _right in (("(x+1)^2", "x^2+2x+1"), ("\\{1,2\\}", "2,\\sqrt{1}"), ("(1,2]", "[1,2]"), ("x=3", "y=4")):
    equal(_left, _right)  # math-verify builds its parsers at first use: here, so that forked calls need not
