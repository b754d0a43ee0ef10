"""Which known name somebody meant. A wrong hint is worse than none, so only a close name is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_FILLERS = frozenset(
    ["use", "enable", "num", "n", "max", "the", "with", "per", "of", "path", "dir", "file", "name", "value", "size"]
)
"""Words that names have or leave out without another meaning."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the one known name that is closest to `name`, or None when none is, or several are.

    Close is, in this order: the same letters; the same words in another order; words with typing errors; a beginning
    of two words or more; other filler words; one word that is missing. Dashes and capitals do not count.
    """
    wanted = _words(name)
    candidates = [(candidate, _words(candidate)) for candidate in known]
    if not wanted:
        return None
    for close in (_same_letters, _same_words, _misspelt, _begins, _filled, _one_word_off):
        matches = [candidate for candidate, words in candidates if close(wanted, words)]
        if matches:
            return matches[0] if len(matches) == 1 else None
    return None


def distance(one: str, other: str) -> int:
    """Return the letters to insert, delete, replace or swap with their neighbour (optimal string alignment)."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, opposite in enumerate(other, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != opposite))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == opposite:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def _words(name: str) -> list[str]:
    return [word for word in name.lower().lstrip("-").replace("-", "_").split("_") if word]


def _same_letters(wanted: Sequence[str], words: Sequence[str]) -> bool:
    return "".join(wanted) == "".join(words)


def _same_words(wanted: Sequence[str], words: Sequence[str]) -> bool:
    return sorted(wanted) == sorted(words)


def _misspelt(wanted: Sequence[str], words: Sequence[str]) -> bool:
    """Each word is the one in its place, but for errors that its length allows; joined words may be one."""
    if len(wanted) == len(words):
        return all(_is_typo(a, b) for a, b in zip(wanted, words, strict=True))
    return abs(len(wanted) - len(words)) == 1 and _is_typo("".join(wanted), "".join(words))


def _is_typo(word: str, meant: str) -> bool:
    """One error in words of 4 letters, two in those of 9, one letter more at the end of short ones."""
    if word == meant:
        return True
    short, long = sorted((word, meant), key=len)
    shortest = len(short)
    if shortest in (2, 3) and long[:-1] == short:
        return shortest == 3 or long[-1] == long[-2]
    return shortest >= 4 and word[0] == meant[0] and distance(word, meant) <= (2 if shortest >= 9 else 1)


def _begins(wanted: Sequence[str], words: Sequence[str]) -> bool:
    return len(wanted) > 1 and len(words) - len(wanted) <= 2 and "_".join(words).startswith("_".join(wanted))


def _filled(wanted: Sequence[str], words: Sequence[str]) -> bool:
    """The names differ in words that mean little alone."""
    one, other = ({word for word in each if word not in _FILLERS} for each in (wanted, words))
    return len(one) > 1 and one == other


def _one_word_off(wanted: Sequence[str], words: Sequence[str]) -> bool:
    """One word is missing beside at least three. A word too much says something that the known name does not."""
    return len(wanted) >= 3 and len(words) - len(wanted) == 1 and set(wanted) < set(words)
