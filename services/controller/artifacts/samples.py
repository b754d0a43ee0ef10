"""Reads the samples that training steps recorded.

The trainer's ranks write RUN_DIR/samples/step_00000012.rank0.jsonl, one line a group, and beside it a file with the
values of each token; `services/trainer/step/sample_log.py` documents their lines.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from miles.regular_files import open_to_read
from miles.rpc.gen import records_pb2, sample_pb2
from miles.services.controller.errors import BadPageToken, NotFoundError

FOLDER = "samples"
MAX_STEPS_A_PAGE = 20
"""Steps read for one page: a filter that nothing passes must not read everything at once."""
PAGE_BYTES = 16 << 20
"""Size at which a page ends, also before it has as many samples as asked for: they must fit into a message."""
_NAME = re.compile(r"step_(\d{8,})\.rank\d+\.jsonl")

SampleKey = tuple[int, int, int]
"""Step, group id, index."""


class UnknownSampleError(NotFoundError):
    """The sample was not recorded."""

    def __init__(self, key: SampleKey) -> None:
        step, group_id, index = key
        super().__init__(f"sample {index} of group {group_id} of step {step} was not recorded")


@dataclasses.dataclass(frozen=True, slots=True)
class SampleFilter:
    """Which samples to return."""

    step: int | None = None
    min_reward: float | None = None
    max_reward: float | None = None

    def passes(self, sample: records_pb2.SampleRecord) -> bool:
        """Return whether a sample passes; one without a reward passes only when no reward is asked for."""
        low, high = self.min_reward, self.max_reward
        if low is None and high is None:
            return True
        if not sample.HasField("reward"):
            return False
        return (low is None or sample.reward >= low) and (high is None or sample.reward <= high)


def list_samples(
    run_dir: pathlib.Path, wanted: SampleFilter, page_size: int, page_token: str
) -> tuple[list[records_pb2.SampleRecord], str]:
    """Return a page of samples, newest step first, and the next page's token (empty: none). Raises BadPageToken.

    Long samples make a page of fewer than `page_size`.
    """
    after = _parse_token(page_token) if page_token else None
    files = _files_by_step(run_dir / FOLDER)
    steps = sorted((s for s in files if wanted.step in (None, s) and (after is None or s <= after[0])), reverse=True)
    page: list[records_pb2.SampleRecord] = []
    nbytes = 0
    for count, step in enumerate(steps):
        if count == MAX_STEPS_A_PAGE:
            return page, f"{step}..-1"
        for sample in _read_step(files[step]):
            if after is not None and step == after[0] and (sample.group_id, sample.index) <= after[1:]:
                continue
            if wanted.passes(sample):
                nbytes += sample.ByteSize()
                if len(page) == page_size or (page and nbytes > PAGE_BYTES):
                    last = page[-1]
                    return page, f"{last.step}.{last.group_id}.{last.index}"
                page.append(sample)
    return page, ""


def find_sample(run_dir: pathlib.Path, key: SampleKey) -> tuple[records_pb2.SampleRecord, dict[str, Any] | None]:
    """Return a sample, and what is known of its tokens (see `sample_log`) or None. Raises UnknownSampleError."""
    step, group_id, index = key
    paths = _files_by_step(run_dir / FOLDER).get(step, [])
    for path in paths:
        for sample in _read_file(path):
            if (sample.group_id, sample.index) == (group_id, index):
                return sample, _find_tokens(path.with_suffix(".tokens.jsonl"), group_id, index)
    raise UnknownSampleError(key)


def _find_tokens(path: pathlib.Path, group_id: int, index: int) -> dict[str, Any] | None:
    return next((line for line in _lines(path) if (line.get("group_id"), line.get("index")) == (group_id, index)), None)


def _parse_token(token: str) -> SampleKey:
    if match := re.fullmatch(r"(\d{1,18})\.(\d{0,18})\.(-?\d{1,9})", token):
        return int(match[1]), int(match[2] or -1), int(match[3])
    raise BadPageToken(token)


def _files_by_step(folder: pathlib.Path) -> dict[int, list[pathlib.Path]]:
    found: dict[int, list[pathlib.Path]] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if match := _NAME.fullmatch(path.name):
                found.setdefault(int(match[1]), []).append(path)
    return found


def _read_step(paths: list[pathlib.Path]) -> list[records_pb2.SampleRecord]:
    samples = [sample for path in paths for sample in _read_file(path)]
    return sorted(samples, key=lambda sample: (sample.group_id, sample.index))


def _read_file(path: pathlib.Path) -> Iterator[records_pb2.SampleRecord]:
    for group in _lines(path):
        for sample in group.get("samples", ()):
            try:
                yield _to_record(group, sample)
            except (KeyError, TypeError, ValueError):  # not what a trainer writes
                continue


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file that are JSON objects; none when a run that resumed from an earlier step removed it."""
    try:
        with open_to_read(path) as file:
            data = file.read()
    except OSError:
        return
    for line in data.splitlines():
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):  # spoiled by a power cut
            continue
        if isinstance(parsed, dict):
            yield parsed


def _to_record(group: dict[str, Any], sample: dict[str, Any]) -> records_pb2.SampleRecord:
    return records_pb2.SampleRecord(
        step=group["step"],
        group_id=group["group_id"],
        index=sample["index"],
        prompt_json=json.dumps(group["prompt"], ensure_ascii=False),
        response=sample["response"],
        label=group["label"],
        reward=sample["reward"],
        reward_parts=sample["reward_parts"],
        status=sample_pb2.SampleStatus.Value(f"SAMPLE_STATUS_{sample['status']}"),
        response_length=sample["response_length"],
        weight_versions=[
            sample_pb2.VersionSpan(version=version, start=start, end=end)
            for version, start, end in sample["weight_versions"]
        ],
        log_prob_diff_mean=sample["log_prob_diff_mean"],
        log_prob_diff_max=sample["log_prob_diff_max"],
        advantage=sample["advantage"],
        cut=group["cut"] or sample["cut"],
    )
