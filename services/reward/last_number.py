"""The reward `last_number`: whether the last number in the response equals the label."""

from __future__ import annotations

import re
from decimal import Decimal

from miles.services.reward.label import label_of
from miles.types import Sample

_NUMBER = re.compile(
    r"""
    (?: (?<![\w)\].,]) [-+\u2212] )?          # a sign, unless it joins two terms as in 3-4
    (?: (?: [0-9]{1,3} (?: , [0-9]{3} )+ (?![0-9])  # thousands separated by commas
          | [0-9]+ )
        (?: \. [0-9]+ )?                      # decimals; a full stop alone ends the sentence
      | (?<![\w.]) \. [0-9]+ )                # .5
    """,
    re.VERBOSE,
)


def last_number(sample: Sample) -> float:
    """1.0 if the last number of the response equals the label as a number, else 0.0; no number scores 0.0.

    Raises `ValueError` when the label is not one number.
    """
    label = label_of(sample)
    wanted = find_last_number(label)
    if wanted is None or _NUMBER.fullmatch(label.strip()) is None:
        raise ValueError(f"the label {label!r:.200} is not a number")
    return float(find_last_number(sample.response) == wanted)


def find_last_number(text: str) -> Decimal | None:
    """The last number in free text, exactly; None when there is none.

    Numbers are the digits 0-9 with an optional sign, thousands commas (1,234 but not 1,2) and decimals (2.50, .5). A
    minus sign counts only where a number begins: "3-4" ends with 4, "= -4" with -4. Exponents and fractions are not
    read: "1/2" ends with 2.
    """
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007 (the last match is the result)
        pass
    return None if last is None else Decimal(last.group().replace(",", "").replace("\N{MINUS SIGN}", "-"))
