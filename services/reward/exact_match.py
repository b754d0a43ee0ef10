"""The reward `exact_match`: whether the response equals the label, ignoring white space around them."""

from __future__ import annotations

from miles.services.reward.label import label_of
from miles.types import Sample


def exact_match(sample: Sample) -> float:
    """1.0 if response and label are equal after stripping white space at both ends, else 0.0."""
    return float(sample.response.strip() == label_of(sample).strip())
