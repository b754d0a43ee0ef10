"""The two tasks of the comparison with TRL: one-digit sums of 16 tokens, and counting, with lengths up to 512."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable

from benchmarks.gpu import counting

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "examples" / "smollm2_chain_sum"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, the same on both sides."""

    score: Callable[[str, str], float]
    """Reward of a response and its label."""
    flags: tuple[str, ...]
    """Have the product score in the same way."""
    prompts: Callable[[pathlib.Path], pathlib.Path]
    """The file of prompts, written below a folder if it is made at run time."""
    max_new_tokens: int
    learning_rate: float
    max_tokens_per_gpu: int
    """Tokens of a micro-batch of the product."""
    template: pathlib.Path = RECIPE / "chat_template.jinja"


def last_number_is(response: str, label: str) -> float:
    """1 when the last number of a response is the label."""
    found = re.findall(r"-?\d+", response)
    return float(bool(found) and found[-1] == label)


TASKS = {
    "sums": Task(
        last_number_is, ("--rm-type", "last_number"), lambda _: RECIPE / "data" / "train.jsonl", 16, 2e-5, 16_384
    ),
    "counting": Task(
        lambda response, label: counting.share_right(response, int(label)),
        ("--no-rm-type", "--custom-rm-path", "benchmarks.gpu.counting.reward"),
        lambda folder: counting.write(folder) / "train.jsonl",
        512,
        1e-7,
        131_072,
    ),
}
"""Counting learns slowly in the comparison: its lengths must stay what the model gives, alike on both sides."""
