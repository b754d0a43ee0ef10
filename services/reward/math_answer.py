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
_CHOICE = re.compile(r"\(?([A-J])(?:[).:].*|\s*)", re.DOTALL)
_DRESSED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|[,;!: ])|[\s{}]|\\?\$")


def math_answer(sample: Sample) -> float:
    r"""1.0 if the response's answer equals the label, else 0.0.

    The answer is the last `\boxed{}` after any thinking or, without one, what math-verify finds there. A last box that
    is never closed is no answer, and a comparison that takes more than 5 s or 2 GiB scores 0.0. Raises ValueError
    when the label holds nothing to compare with.
    """
    wanted = label_answer(label_of(sample))
    if not wanted:
        raise ValueError(f"the label {sample.label!r:.200} holds no answer, with which the reward math compares")
    text = final_answer(sample.response).strip()
    boxes = last_boxes(text)
    if boxes is None or not text:
        return 0.0
    if not boxes:
        return float(_stated(wanted, text) or _holds(functools.partial(expressions.found_in, wanted, text)))
    joined = [", ".join(boxes)] if len(boxes) > 1 else []
    return float(any(_same(wanted, bare_math(answer)) for answer in [boxes[-1], *joined]))


def _same(wanted: str, given: str) -> bool:
    known = _same_plainly(wanted, given)
    if known is not None or max(len(wanted), len(given)) > _MAX_ANSWER:
        return bool(known)
    return _holds(functools.partial(expressions.equal, wanted, given))


def _same_plainly(wanted: str, given: str) -> bool | None:
    """Whether two answers are equal as text, numbers or letters of a choice; None when that does not decide."""
    if _text(wanted) == _text(given):
        return True
    if choice := _CHOICE.fullmatch(_DRESSED.sub(r"\1", wanted).strip()):
        chosen = _CHOICE.fullmatch(_DRESSED.sub(r"\1", given).strip().strip("*"))
        if chosen is not None:
            return choice[1] == chosen[1]
    wanted_number, number = read_quantity(wanted), read_quantity(given)
    if wanted_number is not None and number is not None and wanted_number.comparable(number):
        return wanted_number.equals(number)
    return None


def _stated(wanted: str, text: str) -> bool:
    """Whether free text is, or says in the end that the answer is, plainly the one that is wanted."""
    lines = text.splitlines()
    stated = [found[1] for line in lines if (found := _STATED.search(line))][-1:] or lines[-1:]
    return any(_same_plainly(wanted, bare_math(line.strip(" *.").strip())) for line in stated)


def _text(answer: str) -> str:
    """The answer as text that can be compared: without fonts, layout and case."""
    answer = _DRESSED.sub(r"\1", answer)
    answer = re.sub(r"\\[dtc]frac", r"\\frac", answer).replace("\\varnothing", "\\emptyset")
    return _LAYOUT.sub("", answer).strip(".*").casefold().replace("\u2212", "-")


def _holds(call: Callable[[], bool]) -> bool:
    return bounded(call, _CPU_S) is True
