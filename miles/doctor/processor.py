"""Cores, and the number types that this processor computes in."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping

from miles.cores import usable_cores
from miles.doctor.finding import Finding, ok, warn
from miles.doctor.probe import torch_facts
from miles.doctor.subject import Subject
from miles.precision.number_types import SLOW, slow_type, slowdown_key

_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})
_FEWEST_CORES = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Processor:
    """Facts about the processor."""

    present: int
    usable: int
    flags: frozenset[str]
    """Instruction sets, as /proc/cpuinfo names them."""
    speed: Mapping[str, float] | None
    """`worker_speed` of the processor; None without PyTorch."""
    wanted: tuple[str, ...]
    """Number types that the configuration asks for; empty when the trainer computes on GPUs."""


def look(subject: Subject) -> Processor:
    """Read /proc/cpuinfo and cgroups, and time products of matrices where PyTorch is installed."""
    facts = torch_facts()
    on_cpu = subject.get("device", "cpu") == "cpu"
    wanted = {subject.get("train_dtype", "auto"), subject.get("rollout_dtype", "auto")} - {"auto"} if on_cpu else set()
    return Processor(
        present=os.cpu_count() or 1,
        usable=usable_cores(),
        flags=_flags(pathlib.Path("/proc/cpuinfo").read_text()),
        speed=None if facts is None else facts["speed"],
        wanted=tuple(sorted(wanted)),
    )


def judge(facts: Processor) -> list[Finding]:
    """Judge the number of cores, and whether the asked number types are fast here."""
    limited = f" of {facts.present}, by affinity or a cgroup's quota" if facts.usable < facts.present else ""
    cores = f"{facts.usable} cores{limited}"
    found = [ok(cores)]
    if facts.usable < _FEWEST_CORES:
        found = [warn(cores, "give the container more: docker run --cpus 2")]
    if facts.speed is None:
        return [
            *found,
            ok("number types are not timed: PyTorch is not installed"),
        ]
    slowdown = facts.speed[slowdown_key("bfloat16")]
    has = sorted(facts.flags & _BFLOAT16_FLAGS)
    units = f"instructions for bfloat16: {', '.join(has) or 'none'}"
    factor = f"a product in bfloat16 takes {slowdown:.3g} times as long as in float32"
    for dtype in facts.wanted:
        if dtype != "float32" and (slow := slow_type("this machine", dtype, facts.speed[slowdown_key(dtype)])):
            found.append(warn(slow.split(";")[0], "--train-dtype auto --rollout-dtype auto"))
    chosen = "float32" if slowdown > 1 else "bfloat16"
    if has and slowdown > SLOW:
        found.append(warn(f"{units}, but {factor}", "check ONEDNN_MAX_CPU_ISA; auto takes float32"))
    else:
        found.append(ok(f"{units}; {factor}; on this processor auto takes {chosen}"))
    return found


def _flags(cpuinfo: str) -> frozenset[str]:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
