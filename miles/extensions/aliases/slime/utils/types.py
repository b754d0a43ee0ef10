"""The sample."""

from miles.utils.types import Sample as Sample
