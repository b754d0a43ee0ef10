"""The task of ragged lengths: write the numbers from 1 to N, with few long answers among many short ones.

    python -m benchmarks.gpu.counting --out DIR

The reward is the share of the numbers that are right, so it rises smoothly while a model learns to begin at 1, to go
on, and to stop. Both sides of a comparison score with `share_right`: the product through `reward`
(`--custom-rm-path`), and TRL through a function around it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import re

from miles.types import Sample

FILES = {"train.jsonl": (1024, 7), "eval.jsonl": (64, 12345)}
"""Number of prompts and seed of each file."""
LAST = (3, 120)
"""The smallest and the largest N; the answer to 120 has about 500 tokens."""


def share_right(response: str, last: int) -> float:
    """How many numbers from 1 on are right, over how many there are or should be, whichever is more."""
    numbers = [int(found[:9]) for found in re.findall(r"\d+", response)]
    right = 0
    while right < min(len(numbers), last) and numbers[right] == right + 1:
        right += 1
    return right / max(len(numbers), last)


async def reward(sample: Sample) -> float:
    """`share_right` of a sample whose label is N."""
    if sample.label is None:
        raise ValueError("counting needs a label, the last number to write; set label_key")
    return share_right(sample.response, int(sample.label))


def prompts(count: int, seed: int) -> str:
    """JSON lines with the columns prompt (chat messages) and label; N is spread evenly over its logarithm."""
    draw = random.Random(seed)
    low, high = LAST
    lasts = [round(low * (high / low) ** draw.random()) for _ in range(count)]
    return "".join(
        json.dumps(
            {
                "prompt": [{"role": "user", "content": f"Write the numbers from 1 to {last}, separated by commas."}],
                "label": str(last),
            }
        )
        + "\n"
        for last in lasts
    )


def write(folder: pathlib.Path) -> pathlib.Path:
    """Write the files into a folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (count, seed) in FILES.items():
        (folder / name).write_text(prompts(count, seed))
    return folder


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for train.jsonl and eval.jsonl")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
