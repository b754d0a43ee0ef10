"""Tokens per second through the rollout service against bare `sglang.Engine`, on the same groups and settings.

    python -m benchmarks.gpu.sglang_throughput --tokens 256 --deadline 190
    python -m benchmarks.gpu.sglang_throughput --cases wide wide-fp8 --groups 32 --tokens 256
    python -m benchmarks.gpu.sglang_throughput --cases wide-moe wide-moe-int4 --groups 32 --tokens 256
    python -m benchmarks.gpu.sglang_throughput --device cpu --python .venv-sglang/bin/python --groups 4 --tokens 32

Random models (0.18 B dense, 0.4 B mixture of experts; on a CPU tiny ones) answer groups that are all there at once:
random prompts of 64 tokens, 8 samples each, of a length that random models seldom end before, log-probabilities on.
The cases `wide` and `wide-moe` are a dense model (2.6 B) and a mixture (2.8 B) in bfloat16, and the same weights in FP8
and, as far as routed experts go, in INT4.
The two are `bare` and `service` of `benchmarks.gpu.peers`. The servers of all cases start at the same time, before
anything is measured. Then one case after the other has short rounds that warm both up, and rounds that alternate
between them. After each case its row is printed, with medians and, of the ratio, the smallest and largest of
neighbouring rounds, and where the service's rounds went (as in `benchmarks.gpu.short_groups`). When `--deadline` nears,
cases get fewer rounds: each gets its share of what is left. With `--profile`, further rounds of each case follow after
all, in which the rollout service and SGLang's front process are sampled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.models import write_checkpoint
from benchmarks.gpu.peers import Peer, stop_all
from benchmarks.gpu.short_groups import row, sampled
from benchmarks.gpu.workload import REPOSITORY, Workload

CASES = {
    "dense": ("dense", False),
    "moe": ("moe", False),
    "moe-routing": ("moe", True),
    "wide": ("wide-served", False),
    "wide-fp8": ("wide-served-fp8", False),
    "wide-moe": ("wide-moe", False),
    "wide-moe-fp8": ("wide-moe-fp8", False),
    "wide-moe-int4": ("wide-moe-int4", False),
}
"""Model, and whether routed experts are recorded."""
DEFAULT_CASES = ("dense", "moe", "moe-routing")
CONVERSIONS = {"fp8": "hf-to-fp8", "int4": "hf-to-int4"}
"""Of `miles convert`, by the end of a model's name."""
TINY = {"dense": "tiny", "moe": "tiny-moe", "wide-served": "tiny-wide", "wide-moe": "tiny-moe"}
"""What a CPU has instead."""
WARM_UP_TOKENS = 32
WARM_UPS = 2
STARTING_SHARE = 0.65
"""Of the deadline: how long cases that have started wait for the others, whose start would disturb their rounds."""
PROFILED_ROUNDS = 3


def workload(args: argparse.Namespace, case: str, folder: pathlib.Path) -> Workload:
    """A case's groups; writes its model once."""
    kind, routing = CASES[case]
    size = model_of(kind, folder, on_gpu=args.device == "cuda")
    requests = args.groups * args.samples
    # Each size of a batch that is captured takes its time in every server.
    graphs = {"cuda_graph_bs_decode": sorted({max(1, requests // 8), max(1, requests // 2), requests})}
    profile = args.logs / f"{case}-profile" if args.profile else None
    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
    return Workload(
        model=str(size),
        groups=args.groups,
        samples=args.samples,
        tokens=args.tokens,
        device=args.device,
        python=args.python,
        routing=routing,
        flags=(graphs if args.device == "cuda" else {}) | json.loads(args.flags),
        profile="" if profile is None else str(profile),
    )


def model_of(kind: str, folder: pathlib.Path, *, on_gpu: bool) -> pathlib.Path:
    """The folder of a model, written once; one whose name ends in a format is converted from the other."""
    name, _, form = kind.rpartition("-")
    if form not in CONVERSIONS:
        size = kind if on_gpu else TINY[kind]
        return folder / size if (folder / size).exists() else write_checkpoint(folder / size, size, weights=True)
    if not (folder / kind).exists():
        plain = model_of(name, folder, on_gpu=on_gpu)
        command = [sys.executable, "-m", "miles.cli", "convert", CONVERSIONS[form], "--hf-checkpoint", str(plain)]
        subprocess.run([*command, "--save", str(folder / kind)], cwd=REPOSITORY, check=True)
    return folder / kind


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """The two peers of a case, and what they said in every round."""

    name: str
    load: Workload
    bare: Peer
    service: Peer
    answers: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = dataclasses.field(default_factory=list)

    @classmethod
    def start(cls, name: str, load: Workload, logs: pathlib.Path) -> Case:
        """Start both, without waiting for them."""
        return cls(name, load, Peer("bare", f"{name} bare", load, logs), Peer("service", f"{name} service", load, logs))

    @property
    def peers(self) -> tuple[Peer, Peer]:
        """Both, in the order in which they answer."""
        return self.bare, self.service

    def has_started(self, until: float) -> bool:
        """Whether both have started, or ended, by then."""
        return all(peer.heard(max(0.0, until - time.monotonic())) for peer in self.peers)

    def measure(self, rounds: int, until: float) -> None:
        """Wait until both have started, warm up, and take rounds as long as another one will have ended by `until`.

        `until` is in seconds of the monotonic clock.
        Raises RuntimeError when a peer ends, or would have to work beyond that.
        """
        for peer in self.peers:
            peer.next(until - time.monotonic())
            print(f"{peer.name} had started after {peer.started_s:.0f} s", flush=True)
        warm_up = min(WARM_UP_TOKENS, self.load.tokens)
        for _ in range(WARM_UPS):
            for peer in self.peers:
                peer.measure(warm_up, until - time.monotonic())
        took_s = 0.0
        while len(self.answers) < rounds and time.monotonic() + took_s < until:
            began = time.monotonic()
            bare, service = [peer.measure(self.load.tokens, until - time.monotonic()) for peer in self.peers]
            self.answers.append((bare, service))
            took_s = time.monotonic() - began
            print(f"{self.name}: bare {rate(bare):.0f} tok/s, service {rate(service):.0f}", flush=True)

    def row(self) -> str:
        """Its line of the table."""
        if not self.answers:
            return f"{self.name:<14}{0:>7}"
        bare, service = [[rate(answer) for answer in said] for said in zip(*self.answers, strict=True)]
        shares = [ours / theirs for ours, theirs in zip(service, bare, strict=True)]
        return (
            f"{self.name:<14}{len(shares):>7}{statistics.median(bare):>12.0f}{statistics.median(service):>15.0f}"
            f"{statistics.median(shares):>14.1%}{min(shares):>10.1%}{max(shares):>9.1%}"
        )


def rate(answer: Mapping[str, Any]) -> float:
    """Tokens per second of a round."""
    return float(answer["tokens"] / answer["seconds"])


def table(cases: Sequence[Case]) -> str:
    """The cases so far."""
    heads = f"{'service/bare':>14}{'smallest':>10}{'largest':>9}"
    lines = [f"{'case':<14}{'rounds':>7}{'bare tok/s':>12}{'service tok/s':>15}{heads}"]
    return "\n".join(lines + [case.row() for case in cases])


def print_case(case: Case) -> None:
    """What is known of a case."""
    print(f"\n{table([case])}\nms of its rounds{'':<12}{'median':>9}{'smallest':>10}{'largest':>9}")
    for peer, said in zip(("bare", "service"), zip(*case.answers, strict=True), strict=True):
        row(f"{peer}: all done", [each["seconds"] for each in said])
        for stage in said[0].get("stages", ()):
            row(f"  {stage}", [each["stages"][stage] for each in said])
    print(flush=True)


def measure_all(cases: Sequence[Case], rounds: int, began: float, deadline: float) -> None:
    """Measure cases in turn, those first whose servers have started; prints errors, and goes on with the next case.

    `began` and `deadline` are in seconds of the monotonic clock.
    """
    starting_until = began + STARTING_SHARE * (deadline - began)
    starting = [case for case in cases if not case.has_started(starting_until)]
    waiting = [case for case in cases if case not in starting] + starting
    while waiting:
        case = waiting.pop(0)
        until = time.monotonic() + (deadline - time.monotonic()) / (len(waiting) + 1)
        try:
            case.measure(rounds, until)
        except RuntimeError as error:
            print(f"{case.name}: {error}", flush=True)
        if case.answers:
            print_case(case)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", default=list(DEFAULT_CASES), choices=list(CASES))
    add("--groups", type=int, default=64)
    add("--samples", type=int, default=8)
    add("--tokens", type=int, default=512)
    add("--rounds", type=int, default=5)
    add("--deadline", type=float, default=900.0, help="seconds after which what was measured is reported")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--python", default="", help="interpreter that has SGLang, when it is another one")
    add("--flags", default="{}", help="more SGLang flags, as a JSON object with underscores")
    add("--profile", action="store_true", help="sample the rollout service and SGLang afterwards, into the logs")
    add("--logs", type=pathlib.Path, help="folder for the processes' logs")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print the tables."""
    began = time.monotonic()
    args = parse()
    with tempfile.TemporaryDirectory(prefix="throughput-") as name:
        folder = pathlib.Path(name)
        args.logs = args.logs or folder
        args.logs.mkdir(parents=True, exist_ok=True)
        loads = {case: workload(args, case, folder) for case in args.cases}
        print(f"models written after {time.monotonic() - began:.0f} s", flush=True)
        cases = [Case.start(case, load, args.logs) for case, load in loads.items()]
        try:
            measure_all(cases, args.rounds, began, began + args.deadline)
            size = f"{args.groups} groups x {args.samples} samples x {args.tokens} tokens"
            print(f"\n{size}, log-probabilities on, {args.device}; medians\n{table(cases)}", flush=True)
            for case in cases if args.profile else ():
                sampled(case.service, case.load, PROFILED_ROUNDS)
        finally:
            stop_all([peer for case in cases for peer in case.peers])


if __name__ == "__main__":
    main()
