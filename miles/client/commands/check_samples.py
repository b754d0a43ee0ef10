"""`miles samples check PATH`: proves of stored samples that their parts fit together.

Reads what a run records in RUN_DIR/samples: the log for people (`step_*.jsonl` and `step_*.tokens.jsonl`), and whole
samples with their routed experts (`step_*.groups.pb`, with --log-whole-samples).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from miles.launcher.console import HelpFormatter
from miles.rpc.exit_codes import ExitCode
from miles.types import Sample, SampleFault, SampleStatus, VersionSpan, sample_faults
from miles.types.experts import ExpertLayout, read_expert_layout
from miles.types.stored import SUFFIX, read_groups

FAULTY = 1
Found = tuple[str, list[SampleFault]]
"""Where a sample is stored and which one it is, and what is wrong with it."""


def main(arguments: Sequence[str]) -> int:
    """Check samples; return the exit code: 0 when all of them fit, 1 with faults, 2 when there are none to check."""
    made = argparse.ArgumentParser(
        prog="miles samples check", description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    made.add_argument("paths", nargs="+", type=pathlib.Path, metavar="PATH", help="run folders, or files of samples")
    made.add_argument(
        "--hf-checkpoint", metavar="DIR", help="model that was trained: experts are checked against its config.json"
    )
    made.add_argument("--needs-routing", action="store_true", help="whole samples without routed experts are faults")
    flags = made.parse_args(arguments)
    layout = None
    try:
        if flags.hf_checkpoint is not None and (layout := read_expert_layout(flags.hf_checkpoint)) is None:
            print(f"{flags.hf_checkpoint} is a model without experts", file=sys.stderr)
            return ExitCode.BAD_CONFIG
        files = [file for path in flags.paths for file in _files(path)]
    except OSError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_CONFIG
    samples = faults = 0
    for file in files:
        for where, found in _check(file, layout, needs_routing=flags.needs_routing):
            samples += 1
            faults += len(found)
            for fault in found:
                print(f"{where}: {fault}")
    print(f"{samples} samples in {len(files)} files: {faults or 'no'} fault{'s' * (faults != 1)}")
    if not samples:
        return ExitCode.BAD_CONFIG
    return FAULTY if faults else ExitCode.OK


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of a run folder, or of its folder of samples; a file itself."""
    if path.is_file():
        return [path]
    folder = path / "samples" if (path / "samples").is_dir() else path
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")
    named = [file for file in sorted(folder.iterdir()) if file.name.startswith("step_")]
    return [f for f in named if f.name.endswith(SUFFIX) or (f.suffix == ".jsonl" and ".tokens." not in f.name)]


def _check(file: pathlib.Path, layout: ExpertLayout | None, *, needs_routing: bool) -> Iterator[Found]:
    if not file.name.endswith(SUFFIX):
        yield from _check_log(file)
        return
    try:
        for group in read_groups(file):
            for sample in group.samples:
                where = f"{file}: sample {sample.index} of group {group.group_id}"
                yield where, sample_faults(sample, layout, needs_routing=needs_routing)
    except ValueError as error:
        yield str(file), [SampleFault("file", str(error))]


def _check_log(file: pathlib.Path) -> Iterator[Found]:
    """A log file with the per-token values beside it."""
    beside = file.with_suffix(".tokens.jsonl")
    values = {(line["group_id"], line["index"]): line for _, line in _lines(beside)} if beside.is_file() else {}
    for number, group in _lines(file):
        for sample in group["samples"]:
            key = (group["group_id"], sample["index"])
            where = f"{file}:{number}: sample {key[1]} of group {key[0]}"
            yield where, _logged_faults(sample, values.get(key))


def _lines(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            yield number, json.loads(line)


def _logged_faults(sample: dict[str, Any], values: dict[str, Any] | None) -> list[SampleFault]:
    if values is None:
        return [SampleFault("ids", "the file of per-token values has no line for the sample")]
    length, skipped = sample["response_length"], values["skipped"]
    faults = []
    for name in ("ids", "mask", "advantages", "train", "rollout"):
        count = len(values[name])
        if count not in (length - skipped, 0 if name != "ids" else length - skipped):
            expected = f"expected {length - skipped}, as response_length = {length} and {skipped} are left out"
            faults.append(SampleFault(name, f"{count} values; {expected}"))
    if sample["status"] not in SampleStatus.__members__:
        faults.append(SampleFault("status", f"{sample['status']} is not a status"))
    if faults:
        return faults
    return [
        f for f in sample_faults(_logged_sample(sample, values)) if f.field != "rollout_log_probs" or values["rollout"]
    ]


def _logged_sample(sample: dict[str, Any], values: dict[str, Any]) -> Sample:
    """The sample as far as it is logged: a prompt of one unknown token, and zeros for what was left out."""

    def whole(name: str, dtype: Any) -> Any:
        kept = [np.nan if value is None else value for value in values[name]]
        at = values["skipped_at"]
        return np.concatenate([kept[:at], np.zeros(values["skipped"]), kept[at:]]).astype(dtype)

    return Sample(
        group_id=values["group_id"],
        index=values["index"],
        prompt="",
        tokens=np.concatenate([[0], whole("ids", np.int32)]).astype(np.int32),
        response_length=sample["response_length"],
        response=sample["response"],
        loss_mask=whole("mask", np.uint8) if values["mask"] else None,
        status=SampleStatus[sample["status"]],
        rollout_log_probs=whole("rollout", np.float32) if values["rollout"] else None,
        weight_versions=tuple(VersionSpan(*span) for span in sample["weight_versions"]),
    )
