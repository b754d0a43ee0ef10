"""The reward `dapo`: the answer on the last line `Answer: …`, as the prompts of DAPO's data set ask for it."""

from __future__ import annotations

import re

from miles.answers.boxes import last_boxes
from miles.answers.labels import bare_math
from miles.services.reward.math_answer import same_answer, wanted_answer
from miles.types import Sample

_TAIL = 300
"""Characters at the end of a response among which the answer is looked for."""
_STATED = re.compile(r"(?i)answer\s*:\s*([^\n]+)")


def dapo(sample: Sample) -> dict[str, float]:
    """`score` is 1.0 if the answer that is stated last equals the label, else −1.0; `acc` is 1.0 or 0.0.

    Raises ValueError when the label holds nothing to compare with.
    """
    wanted = wanted_answer(sample, "dapo")
    stated = _STATED.findall(sample.response[-_TAIL:])
    right = bool(stated) and same_answer(wanted, _bare(stated[-1]))
    return {"score": 1.0 if right else -1.0, "acc": float(right)}


def _bare(text: str) -> str:
    boxes = last_boxes(text)
    return bare_math(boxes[-1] if boxes else text.strip().strip("*").removesuffix(".").strip(" *"))
