from __future__ import annotations

import dataclasses
import inspect

import pytest

from miles.queue.keys import JobKeys


def test_every_key_starts_with_the_jobs_prefix() -> None:
    keys = JobKeys("job-1")
    names = [name for name, value in inspect.getmembers(JobKeys) if isinstance(value, property)]
    assert len(names) >= 6
    for name in names:
        found = getattr(keys, name)
        for key in [found] if isinstance(found, str) else found:
            assert key.startswith("miles:job-1:"), name
    assert keys.blob_prefix.startswith("miles:job-1:")
    assert keys.partial(7) == "miles:job-1:partial:7"


def test_no_job_can_reach_into_another_ones_keys() -> None:
    for bad in ("", "a:b", "a*", "a b", "[x]", "a\n", "-a", "ä", "x" * 129):
        with pytest.raises(ValueError, match="job_id"):
            JobKeys(bad)


def test_keys_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        JobKeys("a").job_id = "b"  # type: ignore[misc]
