"""The reference answer that built-in rewards compare with."""

from __future__ import annotations

from miles.types import Sample


def label_of(sample: Sample) -> str:
    """The sample's label. Raises ValueError when it has none."""
    if sample.label is None:
        raise ValueError("the sample has no label; name the data set's answer column with --label-key")
    return sample.label
