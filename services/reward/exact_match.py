"""The reward `exact_match`: whether the response equals the label, ignoring white space around them."""

from __future__ import annotations

from miles.answers.final import final_answer
from miles.services.reward.label import label_of
from miles.types import Sample


def exact_match(sample: Sample) -> float:
    """1.0 if the response after any thinking equals the label, without white space at both ends, else 0.0."""
    label = label_of(sample).strip()
    return float(label in (sample.response.strip(), final_answer(sample.response).strip()))
