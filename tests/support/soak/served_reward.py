"""The reward service of a soak's jobs that bring their own: run as a script, with the port to listen on."""

from __future__ import annotations

import sys

from miles.reward_sdk import reward, serve
from miles.types import Sample


@reward
def sorted_digits(sample: Sample) -> float:
    """1 for the right answer, and a share of it for the right first digits."""
    label = str(sample.label)
    right = next((i for i, (a, b) in enumerate(zip(sample.response, label, strict=False)) if a != b), len(label))
    return right / len(label)


if __name__ == "__main__":
    serve(port=int(sys.argv[1]), workers=1)
