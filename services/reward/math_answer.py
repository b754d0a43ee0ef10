"""The reward `math`: whether the response's answer is the label's, as mathematics or as text."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from miles.answers.boxes import last_boxes
from miles.answers.final import final_answer
from miles.answers.labels import bare_math, label_answer
from miles.answers.quantities import read_quantity
from miles.services.reward import expressions
from miles.services.reward.bounded import bounded
from miles.services.reward.label import label_of
from miles.types import Sample

_CPU_S = 5
_MAX_ANSWER = 2000
"""Characters of an answer that may be an expression; longer ones are compared as numbers or text alone."""
_STATED = re.compile(r"(?i:\b(?:answer|option|choice)\b)[^\S\n]*(?i:is|=|:)[^\S\n]*:?[^\S\n]*(.+)")
_CHOICE = re.compile(r"\(?([A-J])(?:[).:](.*)|\s*)|\(([a-j])\)(.*)", re.DOTALL)
_DRESSED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\!")
_SPACE = re.compile(r"\\(?:displaystyle(?![A-Za-z])|[,;: ])|\\?\$|\s")
_LOOSE_SPACE = re.compile(r"(?<![\w.]) +| +(?![\w.])")
_FRACTION = re.compile(r"\\frac *(?:\{([^{}]*)\}|(\d)) *(?:\{([^{}]*)\}|(\d))")
_SHORT_SCRIPT = re.compile(r"([\^_])\{([\w+*-])\}(?!\w)")
_WORDS = re.compile(
    r"(?:[\d.,:/]++(?: (?=[^\W\d_]{2})|(?=[ap]m$))|(?=.*[^\W\d_]{3}|no$))[^\W\d_]++(?:[ ,'-]++[^\W\d_]++)*+",
    re.IGNORECASE,
)
"""Words, whose case does not matter as that of variables does."""
_UNFINISHED = re.compile(r"(?<![\^{])[-+*/^=]$")
"""An expression that stops at an operator, of which math-verify reads what is before; R^+ is none."""


def math_answer(sample: Sample) -> float:
    r"""1.0 if the response's answer equals the label, else 0.0.

    The answer is the last `\boxed{}` after any thinking or, without one, what math-verify finds there. A last box that
    is never closed is no answer, and a comparison that takes more than 5 s or 2 GiB scores 0.0. Raises ValueError
    when the label holds nothing to compare with.
    """
    wanted = wanted_answer(sample, "math")
    text = final_answer(sample.response).strip()
    boxes = last_boxes(text)
    if boxes is None or not text:
        return 0.0
    if not boxes:
        return float(_stated(wanted, text) or _holds(functools.partial(expressions.found_in, wanted, text)))
    joined = [", ".join(boxes)] if len(boxes) > 1 else []
    return float(any(same_answer(wanted, bare_math(answer)) for answer in [boxes[-1], *joined]))


def wanted_answer(sample: Sample, reward: str) -> str:
    """The answer in the sample's label. Raises ValueError, which names the reward, when there is none."""
    wanted = label_answer(label_of(sample))
    if not wanted:
        raise ValueError(f"the label {sample.label!r:.200} holds no answer, with which the reward {reward} compares")
    return wanted


def same_answer(wanted: str, given: str) -> bool:
    """Whether two answers, without boxes and dollar signs, are equal as text, numbers, choices or mathematics."""
    wanted, given = _without_one_letter(wanted, given)
    known = _same_plainly(wanted, given)
    if known is not None or max(len(wanted), len(given)) > _MAX_ANSWER:
        return bool(known)
    return _holds(functools.partial(expressions.equal, wanted, given))


def _same_plainly(wanted: str, given: str) -> bool | None:
    """Whether two answers are equal as text, numbers or letters of a choice; None when that does not decide."""
    wanted_number, number = read_quantity(wanted), read_quantity(given)
    if wanted_number is not None and number is not None and wanted_number.comparable(number):
        return wanted_number.equals(number)
    wanted_text, text = _text(wanted), _text(given)
    if wanted_text == text:
        return True
    choice, chosen = _choice(wanted), _choice(given)
    if choice and chosen:
        return choice[0] == chosen[0]
    if wanted_text.casefold() == text.casefold():
        return all(map(_WORDS.fullmatch, (wanted_text, text)))
    return False if _UNFINISHED.search(wanted_text) or _UNFINISHED.search(text) else None


def _choice(answer: str) -> tuple[str, str] | None:
    """Return letter and text of a choice, as in "B", "(B)" and "B. 12"; None for another answer."""
    found = _CHOICE.fullmatch(_DRESSED.sub(r"\1", answer).strip().strip("*"))
    return (found[1] or found[3].upper(), (found[2] or found[4] or "").strip()) if found else None


def _without_one_letter(wanted: str, given: str) -> tuple[str, str]:
    """Return the texts of two choices of one letter that both have a text, which decides: "E. coli"; else both."""
    choice, chosen = _choice(wanted), _choice(given)
    if choice and chosen and choice[0] == chosen[0] and choice[1] and chosen[1]:
        return choice[1], chosen[1]
    return wanted, given


def _stated(wanted: str, text: str) -> bool:
    """Whether free text is, or says in the end that the answer is, plainly the one that is wanted."""
    lines = text.splitlines()
    stated = [found[1] for line in lines if (found := _STATED.search(line))][-1:] or lines[-1:]
    answers = [bare_math(line.strip().strip("*").removesuffix(".").strip(" *")) for line in stated]
    return any(_same_plainly(*_without_one_letter(wanted, answer)) for answer in answers)


def _text(answer: str) -> str:
    """The answer as text that can be compared: without fonts, layout and white space that parts no words or numbers."""
    answer = _DRESSED.sub(r"\1", answer).replace("\\varnothing", "\\emptyset").replace("\u2212", "-")
    answer = " ".join(_SPACE.sub(" ", _LAYOUT.sub("", answer)).split())
    if answer.startswith("*"):
        answer = answer.removesuffix(".").strip("* ")
    answer = re.sub(r"\\[dtc]frac", r"\\frac", _LOOSE_SPACE.sub("", answer.removesuffix(".")))
    return _SHORT_SCRIPT.sub(r"\1\2", _FRACTION.sub(r"\\frac{\1\2}{\3\4}", answer))


def _holds(call: Callable[[], bool]) -> bool:
    return bounded(call, _CPU_S) is True
