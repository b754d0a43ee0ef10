"""The steps of a job, which may have been killed and continued: none missing, none twice, no group trained twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def step_faults(steps: Sequence[int], taken: int, *, ended: bool) -> list[str]:
    """Faults of the steps that have metrics; `taken` is the number of steps that the job says it took.

    While the job runs, its metrics may be a step ahead of what it says, or behind.
    """
    if list(steps) != list(range(len(steps))):
        return [f"its metrics have the steps {list(steps)}: they must count from 0 without gap or repetition"]
    if ended and len(steps) != taken:
        return [f"it took {taken} steps, and has metrics of {len(steps)}"]
    return []


def group_faults(trained: Iterable[tuple[int, int, int]]) -> list[str]:
    """Faults of (step, group, index) of all samples: each sample of a group is trained on once."""
    times = Counter((group, index) for _, group, index in trained)
    twice = sorted(sample for sample, count in times.items() if count > 1)
    return [f"samples that were trained on more than once, as (group, index): {twice[:10]}"] if twice else []
