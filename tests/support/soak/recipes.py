"""Jobs of a soak: each with its own prompts, and what is to become of it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import re
from collections.abc import Mapping
from typing import Any

MARKER_DIGITS = 3
"""The prompts of job n begin with these digits of n."""
PROMPTS = 64
STEPS, BATCH = 5, 4
_RUNS_NOW = re.compile(r"soak-\S+ runs now")
"""A queued job says which one runs: nothing of that one's is in it."""
MENTION = re.compile(r"soak-(\d{3})-[a-z-]+")
"""How a text mentions a job: the beginning of its name, its id and its folder."""
FILTER = "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of a kind of job, and its fate."""

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    good: bool = True
    """It succeeds unless it is stopped or cancelled; otherwise it fails or waits, and says why."""
    refused: bool = False
    """It is refused when it is submitted."""
    may_succeed: bool = False
    """It may succeed, too: what is broken may not be needed."""
    because: str = ""
    """What the error or the status of a job that cannot work must match."""


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """What jobs use."""

    model: pathlib.Path
    """Folder with a tiny model in model/."""
    broken_model: pathlib.Path
    runs: pathlib.Path
    prompts: pathlib.Path
    reward: str
    """host:port of a reward service of its own."""


_STALE = {"max_weight_staleness": 2, "partial_rollout": True, "lr": 5e-3, "rollout_temperature": 2.0}

RECIPES: Mapping[str, Recipe] = {
    "sync": Recipe(),
    "stale": Recipe(_STALE),
    "retract": Recipe(
        {"max_weight_staleness": 1, "over_sampling_batch_size": BATCH + 2, "pause_generation_mode": "retract"}
    ),
    "abort": Recipe({**_STALE, "pause_generation_mode": "abort", "use_tis": True}),
    "eval": Recipe({"eval_interval": 2}),
    "lora": Recipe({"lora_rank": 4, "lora_alpha": 8}),
    "served-reward": Recipe({"rm_type": None, "reward_service": "served"}),
    "filtered": Recipe({"dynamic_sampling_filter_path": FILTER, "over_sampling_batch_size": 2 * BATCH}),
    "missing-file": Recipe({"prompt_data": "/missing/train.jsonl"}, good=False, refused=True),
    "unknown-flag": Recipe({"num_rolout": 3}, good=False, refused=True),
    "bad-labels": Recipe({"rm_type": "last_number"}, good=False, because="label"),
    "away-reward": Recipe(
        {"rm_type": None, "reward_service": "away", "reward_timeout_s": 5.0}, good=False, because="reward"
    ),
    "broken-model": Recipe({"hf_checkpoint": "broken"}, good=False, because="broken-model"),
    "all-dropped": Recipe({"dynamic_sampling_filter_path": FILTER}, good=False, because="drop|zero_std"),
    "broken-folder": Recipe(good=False, may_succeed=True, because=r"metrics\.jsonl|log_spans|checkpoints|folder"),
}
"""By name. What a change cannot say (labels, folders, addresses) `body` fills in."""


def body(number: int, name: str, places: Places, **changes: Any) -> dict[str, Any]:
    """Write a job's prompts, break what is to be broken, and return the body of its submission."""
    recipe = RECIPES[name]
    run_dir = places.runs / f"soak-{number:03d}-{name}"
    config: dict[str, Any] = {
        "name": run_dir.name,
        "run_dir": str(run_dir),
        "hf_checkpoint": str(places.model / "model"),
        "prompt_data": str(write_prompts(places.prompts, number, name)),
        "input_key": "prompt",
        "label_key": "label",
        "rm_type": "exact_match",
        "rollout_batch_size": BATCH,
        "n_samples_per_prompt": 4,
        "rollout_max_response_len": 6,
        "rollout_skip_special_tokens": True,
        "rollout_dtype": "float32",
        "train_dtype": "float32",
        "max_running_requests": 16,
        "num_rollout": STEPS,
        "save_interval": 2,
        "log_samples_per_step": BATCH,
        "lr": 5e-4,
        **recipe.changes,
        **changes,
    }
    if name == "eval":
        config["eval_prompt_data"] = [f"sort-{number:03d}", config["prompt_data"]]
    if config.get("hf_checkpoint") == "broken":
        config["hf_checkpoint"] = str(places.broken_model)
    if address := {"served": places.reward, "away": "127.0.0.1:9"}.get(str(config.get("reward_service"))):
        config["reward_service"] = [f"default={address}"]
    if name == "broken-folder":
        break_folder(run_dir, number)
    return {key: value for key, value in config.items() if value is not None}


def break_folder(run_dir: pathlib.Path, number: int) -> None:
    """Leave something in a run folder that no run has written, and that a run cannot read or write."""
    run_dir.mkdir(parents=True, exist_ok=True)
    match number % 3:
        case 0:
            (run_dir / "metrics.jsonl").mkdir()
        case 1:
            (run_dir / "log_spans.json").write_text("[{")
        case _:
            (run_dir / "checkpoints").write_text("a file, where a folder belongs")


def marker(number: int) -> str:
    """What the prompts of a job begin with."""
    return f"{number % 10**MARKER_DIGITS:0{MARKER_DIGITS}d}"


def write_prompts(folder: pathlib.Path, number: int, name: str) -> pathlib.Path:
    """Write prompts of five digits that begin with the job's marker; the label is the digits in order."""
    rng = random.Random(number)
    lines = []
    for _ in range(PROMPTS):
        digits = marker(number) + f"{rng.randrange(100):02d}"
        label = {"bad-labels": "no number", "all-dropped": "never"}.get(name, "".join(sorted(digits)))
        lines.append(json.dumps({"prompt": f"{digits}>", "label": label}) + "\n")
    path = folder / f"soak-{number:03d}-{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return path


def mentions(text: str) -> set[int]:
    """Numbers of the jobs that a text mentions."""
    return {int(number) for number in MENTION.findall(_RUNS_NOW.sub("", text))}
