"""A log of some samples of each training step, for people to look at.

Each rank writes its part of a step's first groups to RUN_DIR/samples/step_00000012.rank0.jsonl, a group a line:
{"step", "group_id", "prompt", "label", "cut", "samples": [{"index", "response", "reward", "reward_parts", "status",
"response_length", "weight_versions": [[version, start, end]], "log_prob_diff_mean", "log_prob_diff_max", "advantage",
"cut"}]}. Per-token metrics go to step_00000012.rank0.tokens.jsonl beside it, a sample a line: {"group_id",
"index", "ids", "mask", "advantages", "train", "rollout", "skipped", "skipped_at"}, log-probabilities in nats; lists are
empty for what is not known. With log_whole_samples the samples themselves are in step_00000012.rank0.groups.pb
(`miles.types.stored`). The controller merges the ranks' parts when it is asked for them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.types import Prompt, Sample, SampleGroup
from miles.types.stored import SUFFIX, write_groups

FOLDER = "samples"
MAX_TEXT_CHARS = 32_768
"""Longer prompts and responses are cut in the middle."""
MAX_TOKENS = 4096
"""Of longer responses, the metrics of this many tokens are kept: half from the start, half from the end."""
_DIGITS = 4
"""Decimals of per-token metrics."""
_NAME = re.compile(r"step_(\d{8,})\.rank\d+(?:(?:\.tokens)?\.jsonl|\.groups\.pb)")


@dataclasses.dataclass(frozen=True, slots=True)
class TokenMetrics:
    """Per-token metrics of a sample's response; each [response_length]."""

    mask: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float32]
    train_log_probs: npt.NDArray[np.float32]
    rollout_log_probs: npt.NDArray[np.float32] | None


class SampleLog:
    """One rank's files of a run. `groups` groups of each step are logged; 0 logs none."""

    def __init__(
        self, run_dir: pathlib.Path, groups: int, rank: int, reward_key: str | None, *, whole: bool = False
    ) -> None:
        """`whole`: samples are also written as they are, with prompt tokens and routed experts."""
        self.groups = groups
        self._whole = whole
        self._folder = run_dir / FOLDER
        self._rank = rank
        self._reward_key = reward_key

    def discard_from(self, step: int) -> None:
        """Discard what an interrupted run logged of this step and later ones: they will be taken again."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                match = _NAME.fullmatch(path.name)
                if match and int(match[1]) >= step:
                    path.unlink(missing_ok=True)

    def write(self, step: int, samples: Iterable[tuple[Sample, TokenMetrics | None]]) -> None:
        """Log samples of a step; one that was not trained on has no metrics."""
        groups: dict[int, dict[str, Any]] = {}
        tokens: list[dict[str, Any]] = []
        members: dict[int, list[Sample]] = {}
        for sample, metrics in samples:
            members.setdefault(sample.group_id, []).append(sample)
            if sample.group_id not in groups:
                groups[sample.group_id] = _group(step, sample)
            groups[sample.group_id]["samples"].append(self._sample(sample, metrics))
            tokens.append(_tokens(sample, metrics))
        if not groups:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{step:08d}.rank{self._rank}"
        if self._whole:
            self._write_whole(f"{name}{SUFFIX}", members)
        self._write(f"{name}.tokens.jsonl", tokens)
        self._write(f"{name}.jsonl", [groups[group_id] for group_id in sorted(groups)])

    def _write(self, name: str, lines: Iterable[dict[str, Any]]) -> None:
        """Write a file of JSON lines that appears complete or not at all."""
        path = self._folder / name
        partial = path.with_suffix(".tmp")
        text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)

    def _write_whole(self, name: str, members: Mapping[int, list[Sample]]) -> None:
        """Write this rank's samples of each group."""
        path = self._folder / name
        partial = path.with_suffix(".tmp")
        ordered = {group_id: sorted(found, key=lambda s: s.index) for group_id, found in sorted(members.items())}
        write_groups(partial, (SampleGroup("", group_id, found) for group_id, found in ordered.items()))
        partial.replace(path)

    def _sample(self, sample: Sample, metrics: TokenMetrics | None) -> dict[str, Any]:
        response, cut = cut_text(sample.response)
        parts = sample.reward if isinstance(sample.reward, dict) else {}
        reward = parts.get(self._reward_key or "") if isinstance(sample.reward, dict) else sample.reward
        return {
            "index": sample.index,
            "response": response,
            "reward": reward,
            "reward_parts": parts,
            "status": sample.status.name,
            "response_length": sample.response_length,
            "weight_versions": [[span.version, span.start, span.end] for span in sample.weight_versions],
            **summarise(metrics),
            "cut": cut,
        }


def summarise(metrics: TokenMetrics | None) -> dict[str, float | None]:
    """Mean and largest |trainer's - engine's log-probability| and mean advantage, over trained tokens."""
    summary: dict[str, float | None] = {"log_prob_diff_mean": None, "log_prob_diff_max": None, "advantage": None}
    if metrics is None or not (trained := metrics.mask > 0).any():
        return summary
    summary["advantage"] = round(float(metrics.advantages[trained].mean()), 6)
    if metrics.rollout_log_probs is not None:
        difference = np.abs(metrics.train_log_probs - metrics.rollout_log_probs)[trained]
        summary["log_prob_diff_mean"] = round(float(difference.mean()), 6)
        summary["log_prob_diff_max"] = round(float(difference.max()), 6)
    return {name: value if value is not None and np.isfinite(value) else None for name, value in summary.items()}


def _tokens(sample: Sample, metrics: TokenMetrics | None) -> dict[str, Any]:
    """Per-token metrics as a line of the log, without the middle of a long response."""
    length = sample.response_length
    half = MAX_TOKENS // 2
    skipped = max(0, length - 2 * half)

    def kept(values: npt.NDArray[Any] | None) -> list[Any]:
        if values is None or not length:
            return []
        chosen = values[-length:] if not skipped else np.concatenate([values[-length:][:half], values[-half:]])
        if not np.issubdtype(chosen.dtype, np.floating):
            return list(chosen.tolist())
        return [round(value, _DIGITS) if math.isfinite(value) else None for value in chosen.tolist()]

    line = {
        "group_id": sample.group_id,
        "index": sample.index,
        "ids": kept(sample.tokens),
        "mask": [],
        "advantages": [],
        "train": [],
        "rollout": kept(sample.rollout_log_probs),
        "skipped": skipped,
        "skipped_at": half if skipped else 0,
    }
    if metrics is not None:
        line["mask"] = kept((metrics.mask > 0).astype(np.uint8))
        line["advantages"] = kept(metrics.advantages)
        line["train"] = kept(metrics.train_log_probs)
        line["rollout"] = kept(metrics.rollout_log_probs)
    return line


def cut_text(text: str) -> tuple[str, bool]:
    """The text, and False; or its beginning and end when it is too long, and True."""
    if len(text) <= MAX_TEXT_CHARS:
        return text, False
    half = MAX_TEXT_CHARS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}", True


def _group(step: int, sample: Sample) -> dict[str, Any]:
    prompt, cut = _cut_prompt(sample.prompt)
    return {
        "step": step,
        "group_id": sample.group_id,
        "prompt": prompt,
        "label": sample.label,
        "cut": cut,
        "samples": [],
    }


def _cut_prompt(prompt: Prompt) -> tuple[Prompt, bool]:
    if isinstance(prompt, str):
        return cut_text(prompt)
    if len(json.dumps(prompt, ensure_ascii=False)) <= MAX_TEXT_CHARS:
        return prompt, False
    return cut_text(json.dumps(prompt, ensure_ascii=False))
