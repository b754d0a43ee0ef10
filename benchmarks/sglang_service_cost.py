"""CPU time per response from SGLang, by process: with our engine and without.

    MILES_TEST_SGLANG=.venv-sglang/bin/python python -m benchmarks.sglang_service_cost
    MILES_TEST_SGLANG=.venv-sglang/bin/python python -m benchmarks.sglang_service_cost --cases moe-routing --tokens 2048

The requests are those of `benchmarks.gpu.sglang_throughput`, answered on the CPU by a model with next to no arithmetic,
so that what is left is the work of the host, which on a GPU decides how far the service stays behind the bare engine.
CPU time, unlike wall time, changes little when other programs run; what the processes spend when idle is taken off.
One row for each way: `bare` is sglang.Engine, where the process of the tokenizer is also that of the caller; the others
are the engine of the rollout service with so many requests of a group, sent together, and so many tokens from one event
of a stream to the next. Responses are short, as a scheduler without a GPU would drown the rest otherwise: what counts
is the cost of a request with so many events. 32 tokens have eight events every 4 tokens, as 512 have every 64, and two
every 16, as 512 have every 256. The scheduler's share is the model's, and without meaning for the bare engine's, which
polls.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence

import psutil

from benchmarks.gpu.models import write_checkpoint
from benchmarks.gpu.peers import START_DEADLINE_S, Peer
from benchmarks.gpu.sglang_throughput import CASES
from benchmarks.gpu.workload import Workload

PARTS = ("engine", "tokenizer", "detokenizer", "scheduler")
IDLE_S = 8.0
"""How long each process is watched doing nothing; what it spends then is taken off."""


def part_of(process: psutil.Process, bare: bool) -> str | None:
    """Which of PARTS a process is; None for what only measures."""
    title = " ".join(process.cmdline())
    if "sglang::scheduler" in title or "sglang::detokenizer" in title:
        return "scheduler" if "scheduler" in title else "detokenizer"
    if bare:
        return "tokenizer" if "benchmarks.gpu.peers bare" in title else None
    if "sglang.launch_server" in title:
        return "tokenizer"
    return "engine" if "benchmarks.gpu.peers engine" in title else None


def cpu_seconds(worker: Peer) -> dict[str, float]:
    """CPU time of each part so far, as the kernel's scheduler counts it: to the microsecond, unlike clock ticks."""
    bare = worker.name.endswith("bare")
    spent = dict.fromkeys(PARTS, 0.0)
    root = psutil.Process(worker.pid)
    for process in (root, *root.children(recursive=True)):
        if (part := part_of(process, bare)) is not None:
            tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/schedstat")
            spent[part] += sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
    return spent


def measure(args: argparse.Namespace, kind: str, name: str, load: Workload, logs: pathlib.Path) -> dict[str, float]:
    """CPU seconds of each part per 1000 tokens."""
    worker = Peer(kind, name, load, logs)
    try:
        worker.next(START_DEADLINE_S)
        worker.measure(load.tokens)
        before = cpu_seconds(worker)
        time.sleep(IDLE_S)
        idle = cpu_seconds(worker)
        answers = [worker.measure(load.tokens) for _ in range(args.rounds)]
        after = cpu_seconds(worker)
    finally:
        worker.stop()
    tokens, wall_s = sum(answer["tokens"] for answer in answers), sum(answer["seconds"] for answer in answers)
    idle_share = {part: (idle[part] - before[part]) / IDLE_S for part in PARTS}
    return {part: (after[part] - idle[part] - idle_share[part] * wall_s) / tokens * 1000 for part in PARTS}


def row(case: str, way: str, spent: dict[str, float], tokens: int) -> str:
    """A line of the table: milliseconds per 1000 tokens, and microseconds per request of so many tokens."""
    host_s = sum(spent[part] for part in PARTS if part != "scheduler")
    cells = "".join(f"{spent[part] * 1000:>13.2f}" for part in PARTS)
    return f"{case:<13}{way:<14}{cells}{host_s * 1000:>19.2f}{host_s * 1000 * tokens:>21.0f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", default=["dense", "moe-routing"], choices=list(CASES))
    ways = "bare, or requests of a group : tokens between events"
    add("--ways", nargs="+", default=["bare", "1:4", "1:16", "8:16"], help=ways)
    add("--requests", type=int, default=64)
    add("--tokens", type=int, default=32)
    add("--rounds", type=int, default=2)
    add("--python", default="", help="interpreter that has SGLang; default: $MILES_TEST_SGLANG")
    add("--flags", default="{}", help="more SGLang flags, as a JSON object with underscores")
    add("--logs", type=pathlib.Path, help="folder for the processes' logs")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print the table."""
    args = parse()
    flags = json.loads(args.flags)
    print(f"{args.requests} requests x {args.tokens} tokens, log-probabilities on; CPU ms per 1000 tokens")
    print(
        f"{'case':<13}{'way':<14}"
        + "".join(f"{part:>13}" for part in PARTS)
        + f"{'without scheduler':>19}{'us of it per request':>21}"
    )
    with tempfile.TemporaryDirectory(prefix="service-cost-") as folder:
        logs = args.logs or pathlib.Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        for case in args.cases:
            size = "tiny-moe" if CASES[case][0] == "moe" else "tiny"
            model = str(write_checkpoint(pathlib.Path(folder) / size, size, weights=True))
            for way in args.ways:
                samples, interval = (1, 256) if way == "bare" else map(int, way.split(":"))
                load = Workload(
                    model=model,
                    groups=args.requests // samples,
                    samples=samples,
                    tokens=args.tokens,
                    device="cpu",
                    python=args.python,
                    routing=CASES[case][1],
                    flags=flags if way == "bare" else flags | {"stream_interval": interval},
                )
                kind, title = ("bare", "bare") if way == "bare" else ("engine", f"{samples}, every {interval}")
                print(row(case, title, measure(args, kind, f"{case} {kind}", load, logs), args.tokens), flush=True)


if __name__ == "__main__":
    main()
