"""What `long_sequences` measures: samples of a length, and the memory that a process takes for something."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from miles.memory.sequences import Routing, SampleSize
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan

EXPERTS = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What a group has."""

    samples: int
    tokens: int
    layers: int
    top_k: int

    @property
    def sample(self) -> SampleSize:
        """As the formulas take it."""
        return SampleSize(256, self.tokens - 256, Routing(self.layers, self.top_k, EXPERTS))


@dataclasses.dataclass(slots=True)
class Measured:
    """One row of the table."""

    what: str
    payload: int
    said: int | None = None
    peak: int = 0
    seconds: float = 0.0


def make_group(sizes: Sizes, group_id: int = 0) -> SampleGroup:
    """Samples of one prompt with random tokens and routing."""
    random = np.random.default_rng(group_id)
    prompt = random.integers(0, 256, sizes.sample.prompt_tokens, np.int32)
    length = sizes.sample.response_tokens
    shape = (sizes.tokens - 1, sizes.layers, sizes.top_k)
    samples = [
        Sample(
            group_id=group_id,
            index=index,
            prompt="a prompt",
            tokens=np.concatenate([prompt, random.integers(0, 256, length, np.int32)]),
            response_length=length,
            response="word" * length,
            reward=float(index % 2),
            status=SampleStatus.COMPLETED,
            rollout_log_probs=-random.random(length, np.float32),
            rollout_routed_experts=random.integers(0, EXPERTS, shape, np.uint8),
            weight_versions=(VersionSpan(0, 0, length),),
        )
        for index in range(sizes.samples)
    ]
    return SampleGroup("long", group_id, samples)


def tiny(sizes: Sizes) -> Sizes:
    """For a first run, which imports and allocates what is not counted."""
    return dataclasses.replace(sizes, tokens=300)


def _status(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


@contextmanager
def measuring(row: Measured) -> Iterator[None]:
    """Fill in peak and time."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began = _status("VmRSS"), time.perf_counter()
    yield
    row.seconds = time.perf_counter() - began
    row.peak = max(0, _status("VmHWM") - before)
