"""Nothing of one job appears in another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from soak.recipes import marker, mentions

ALLOWED_KEYS = tuple(
    f"miles:{name}" for name in ("jobs", "requests", "run_dirs", "lease_number", "controller", "connection_check")
)
"""Keys of Redis that are not of one job."""


def text_faults(number: int, what: str, text: str) -> list[str]:
    """Faults of a text that REST gave, or a file, of one job: it must not mention another job."""
    others = sorted(mentions(text) - {number})
    if not others:
        return []
    line = next(line for line in text.splitlines() if mentions(line) - {number})
    return [f"{what} of job {number} mentions jobs {others}: {line.strip()[:300]}"]


def sample_faults(number: int, samples: Iterable[Mapping[str, Any]]) -> list[str]:
    """Faults of samples: each prompt begins with its job's marker."""
    wrong = [s["prompt"] for s in samples if not str(s["prompt"]).startswith(marker(number))]
    return [f"samples of job {number} have prompts of others: {wrong[:3]}"] if wrong else []


def event_faults(number: int, events: Iterable[str]) -> list[str]:
    """Faults of server-sent events' data: ids rise, and nothing is of another job."""
    faults: list[str] = []
    last = (0, 0)
    for data in events:
        faults += text_faults(number, "an event", data)
        event = json.loads(data)
        if event["type"] == "end":
            continue
        milliseconds, _, count = event["id"].partition("-")
        if (now := (int(milliseconds), int(count))) <= last:
            faults.append(f"event {event['id']} of job {number} follows {last[0]}-{last[1]}")
        last = now
    return faults


def key_faults(keys: Iterable[str], ids: Iterable[str], allowed: Iterable[str] = ALLOWED_KEYS) -> list[str]:
    """Faults of the names of Redis' keys: each is of a job that was submitted, or one of the few that are of none."""
    prefixes = tuple(prefix for job_id in ids for prefix in (f"miles:{job_id}:",))
    records = {f"miles:job:{job_id}" for job_id in ids}
    strange = [k for k in keys if k not in allowed and k not in records and not k.startswith(prefixes)]
    return [f"Redis has keys of no job: {sorted(strange)[:5]}"] if strange else []
