"""Reads everything that REST and the run folder say of a job, and checks it."""

from __future__ import annotations

import re
from typing import Any

from soak.invariants import isolation, steps, streams
from soak.jobs import SoakJob
from soak.records import Records
from soak.rest import Rest

_TEXTS = (".json", ".jsonl", ".yaml", ".txt")
_PARTS = ("timeline", "checkpoints", "versions", "status", "workers")


def look(job: SoakJob, rest: Rest, records: Records) -> None:
    """Check what a job shows now. Raises Away while services are."""
    number = job.number
    faults: list[str] = []
    document = rest.get(f"/v1/jobs/{job.id}")
    ended = document["state"] == job.state and not job.open
    for part in _PARTS:
        # A queued job's status may name those before it; an ended job's engines hold no versions.
        if (part, ended) != ("versions", True) and (part, job.state) != ("status", "queued"):
            faults += isolation.text_faults(number, part, rest.text(f"/v1/jobs/{job.id}/{part}"))
    metrics = rest.get(f"/v1/jobs/{job.id}/metrics", name="perf/step_time")
    faults += isolation.text_faults(number, "metrics", str(metrics["names"]))
    strange = [n for n in metrics["names"] if n.startswith("eval/") and f"sort-{number:03d}" not in n]
    faults += [f"job {number} has metrics {strange}"] if strange else []
    taken = metrics["series"][0]["steps"] if metrics["series"] else []
    faults += steps.step_faults(taken, document["policy_version"], ended=ended)
    samples = _samples(job, rest)
    faults += isolation.sample_faults(number, samples)
    faults += steps.group_faults((sample["step"], sample["group_id"], sample["index"]) for sample in samples)
    events = rest.text(f"/v1/jobs/{job.id}/events", follow="false")
    faults += isolation.event_faults(number, re.findall(r"^data: (.*)$", events, re.MULTILINE))
    if ended:
        faults += streams.stream_faults(job.watcher.ids, re.findall(r"^id: (.*)$", events, re.MULTILINE))
    for log in rest.get(f"/v1/jobs/{job.id}/logs")["logs"]:
        text = rest.get(f"/v1/jobs/{job.id}/logs/{log['name']}", offset=0, limit=1 << 18)["text"]
        faults += isolation.text_faults(number, f"log {log['name']}", text)
    for path in job.run_dir.rglob("*"):
        if path.suffix in _TEXTS and path.is_file():
            faults += isolation.text_faults(number, f"file {path}", path.read_text(errors="replace"))
    for fault in faults:
        records.violation("isolation and steps", f"job {job.id}: {fault}")


def _samples(job: SoakJob, rest: Rest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = rest.get(f"/v1/jobs/{job.id}/samples", limit=100, cursor=cursor)
        found += page["samples"]
        cursor = page["next_cursor"]
    return found
