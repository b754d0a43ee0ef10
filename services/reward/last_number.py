"""The reward `last_number`: whether the last number in the response equals the label."""

from __future__ import annotations

from miles.answers.final import final_answer
from miles.answers.labels import label_number
from miles.answers.numbers import find_last_number
from miles.services.reward.label import label_of
from miles.types import Sample


def last_number(sample: Sample) -> float:
    """1.0 if the last number of the response, after any thinking, equals the label's, else 0.0; no number scores 0.0.

    Raises `ValueError` when the label does not hold exactly one number.
    """
    label = label_of(sample)
    wanted = label_number(label)
    if wanted is None:
        raise ValueError(f"the label {label!r:.200} is not one number")
    return float(find_last_number(final_answer(sample.response)) == wanted)
