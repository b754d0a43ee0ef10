"""The reward `deepscaler`: `math` for models that think, where a response without an end of thinking has no answer."""

from __future__ import annotations

from miles.answers.boxes import last_boxes
from miles.answers.final import final_answer
from miles.answers.labels import bare_math
from miles.services.reward.math_answer import same_answer, wanted_answer
from miles.types import Sample

_ANSWER_BEGINS = "###Response"


def deepscaler(sample: Sample) -> float:
    r"""1.0 if the last `\boxed{}` behind the thinking equals the label, else 0.0.

    The answer begins behind the last end of thinking or, in a response without one, behind `###Response`. A response
    with neither, or without a box there, scores 0.0. Raises ValueError when the label holds nothing to compare with.
    """
    wanted = wanted_answer(sample, "deepscaler")
    boxes = last_boxes(_behind_thinking(sample.response)) or []
    return float(any(same_answer(wanted, bare_math(answer)) for answer in boxes[-1:]))


def _behind_thinking(response: str) -> str:
    answer = final_answer(response)
    if len(answer) < len(response):  # something in front of it was thought
        return answer
    return response.partition(_ANSWER_BEGINS)[2]
