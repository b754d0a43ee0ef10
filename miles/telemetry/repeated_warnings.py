"""Turns warnings that repeat into one line with a count. Pure."""

from __future__ import annotations

import re
from collections import Counter

_GROWTH = 10
_MOST_KINDS = 64
_OTHER = "other warnings"
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|[\w.:/-]*\d[\w.:/-]*")
"""What differs between warnings of one kind: quoted texts, numbers, and names with numbers in them."""


class RepeatedWarnings:
    """Lets the 1st, 10th, 100th, … warning of a kind pass, with the number of them so far."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def note(self, text: str) -> str:
        """Return the line to write for a warning; empty when one like it was written and says it all."""
        kind = _PARTICULARS.sub("#", text)
        if kind not in self._counts and len(self._counts) >= _MOST_KINDS:
            kind = _OTHER
        self._counts[kind] += 1
        count = self._counts[kind]
        if count == 1:
            return text
        return f"{text} ({count} times by now)" if _is_power(count) else ""


def _is_power(count: int) -> bool:
    while count % _GROWTH == 0:
        count //= _GROWTH
    return count == 1
