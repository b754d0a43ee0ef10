"""What is in a folder that does not say whose it is: nothing, what a run leaves, or something else."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re

from miles.ownership.owner_file import NAME

_RUN_MARKS = ("run.lock", "log_spans.json", "timeline.jsonl")
"""Files of a run folder that nobody else has."""
_RUN_FILES = (
    *("metrics.jsonl", "summary.json", "controller.address", "reward.png", *_RUN_MARKS),
    *("checkpoints", "drafts", "hf", "logs", "mlflow", "redis", "samples", "tensorboard", "wandb", "weightsync"),
)
"""What a run writes into its folder."""
_PROJECT_MARKS = (".git", ".hg", ".svn", "pyproject.toml", "setup.py", "package.json", "Cargo.toml")
_STEP = re.compile(r"step_\d{8,}(\.old|\.tmp)?")
_SHOWN = 3


def names_in(folder: pathlib.Path) -> list[str]:
    """Return the names in a folder except that of its owner file; none when there is no such folder."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith(NAME))
    except FileNotFoundError:
        return []


def listed(names: list[str]) -> str:
    """Name a few of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def strange_in_run_dir(folder: pathlib.Path) -> str:
    """Say what speaks against an unmarked folder as run folder; empty when nothing does.

    Other files may be in it, as a configuration or the shell's log, unless a run would write over them.
    """
    if folder == folder.parent or folder == pathlib.Path.home():
        return "it is not a folder for one run"
    names = names_in(folder)
    if any(name in names for name in _RUN_MARKS):
        return ""
    if projects := [name for name in _PROJECT_MARKS if name in names]:
        return f"a project is in it ({listed(projects)})"
    if "config.json" in names and any(name.endswith((".safetensors", ".bin")) for name in names):
        return "a model is in it"
    if runs := [name for name in names if is_run(folder / name)]:
        return f"other runs are in it ({listed(runs)})"
    if clashing := [name for name in names if name in _RUN_FILES]:
        return f"a run would write over what is in it ({listed(clashing)})"
    return ""


def is_run(folder: pathlib.Path) -> bool:
    """Return whether a folder is marked as a run's, or looks like one."""
    return any((folder / name).is_file() for name in (NAME, *_RUN_MARKS))


def strange_in_checkpoints(folder: pathlib.Path) -> str:
    """Say what speaks against an unmarked folder as folder of checkpoints; empty when nothing does."""
    names = names_in(folder)
    if not names or any(_STEP.fullmatch(name) and (folder / name).is_dir() for name in names):
        return ""
    return f"other files are in it ({listed(names)})"


def strange_in_export(folder: pathlib.Path, run_dir: pathlib.Path, pattern: str | None) -> str:
    """Say what speaks against an unmarked folder as place of an export, which replaces what is in it.

    A folder looks like an earlier export of the run when the summary in the run folder names it, or another step of
    the same `pattern` (a regular expression), and it holds files only, beside the folder of an adapter.
    """
    names = names_in(folder)
    if not names:
        return ""
    holds = f"other files are in it ({listed(names)})"
    others = [name for name in names if not (folder / name).is_file() or (folder / name).is_symlink()]
    if others not in ([], ["adapter"]) or "config.json" not in names:
        return holds
    if folder.parent == pathlib.Path(os.path.realpath(run_dir / "hf")) and folder.name.isdigit():
        return ""
    exported = _last_export(run_dir)
    if exported is None:
        return holds
    last = os.path.realpath(exported)
    same_pattern = pattern is not None and re.fullmatch(pattern, last) and re.fullmatch(pattern, str(folder))
    return "" if last == str(folder) or same_pattern else holds


def _last_export(run_dir: pathlib.Path) -> str | None:
    """Return the folder that the run's summary names as its newest export."""
    try:
        summary = json.loads((run_dir / "summary.json").read_bytes())
    except (OSError, ValueError):
        return None
    exported = summary.get("hf_checkpoint") if isinstance(summary, dict) else None
    return exported if isinstance(exported, str) else None


def owned_above(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the folders above one that are marked as somebody's, the nearest first."""
    return list(itertools.islice((parent for parent in folder.parents if (parent / NAME).is_file()), 4))
