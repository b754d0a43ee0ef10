"""Tokens per second through the rollout service against bare `sglang.Engine`, on the same groups and settings.

    python -m benchmarks.gpu.sglang_throughput
    python -m benchmarks.gpu.sglang_throughput --device cpu --python .venv-sglang/bin/python --groups 4 --tokens 32

Random models (0.18 B dense, 0.4 B mixture of experts; on a CPU tiny ones) answer groups that are all there at once:
random prompts of 64 tokens, 8 samples each, of a length that random models seldom end before, log-probabilities on.
The two are `bare` and `service` of `benchmarks.gpu.peers`. Every server is started before anything is measured; rounds
then alternate between all of them, one at work at a time, after a warm-up. The table has medians and, of the ratio, the
smallest and largest of neighbouring rounds.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
from collections.abc import Sequence

from benchmarks.gpu.models import write_checkpoint
from benchmarks.gpu.peers import CPU_FLAGS as CPU_FLAGS
from benchmarks.gpu.peers import GPU_FLAGS as GPU_FLAGS
from benchmarks.gpu.peers import Peer, Workload, alternate
from benchmarks.gpu.peers import prompts as prompts

CASES = {"dense": ("dense", False), "moe": ("moe", False), "moe-routing": ("moe", True)}
"""Model, and whether routed experts are recorded."""


def workload(args: argparse.Namespace, case: str, folder: pathlib.Path) -> Workload:
    """A case's groups; writes its model once."""
    kind, routing = CASES[case]
    size = kind if args.device == "cuda" else {"dense": "tiny", "moe": "tiny-moe"}[kind]
    if not (folder / size).exists():
        write_checkpoint(folder / size, size, weights=True)
    return Workload(
        model=str(folder / size),
        groups=args.groups,
        samples=args.samples,
        tokens=args.tokens,
        device=args.device,
        python=args.python,
        routing=routing,
        flags=json.loads(args.flags),
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    add("--groups", type=int, default=64)
    add("--samples", type=int, default=8)
    add("--tokens", type=int, default=512)
    add("--rounds", type=int, default=5)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--python", default="", help="interpreter that has SGLang, when it is another one")
    add("--flags", default="{}", help="more SGLang flags, as a JSON object with underscores")
    add("--logs", type=pathlib.Path, help="folder for the processes' logs")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print the table."""
    args = parse()
    with tempfile.TemporaryDirectory(prefix="throughput-") as name:
        folder = pathlib.Path(name)
        logs = args.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        loads = {case: workload(args, case, folder) for case in args.cases}
        peers = [
            Peer(kind, f"{case} {kind}", load, logs) for case, load in loads.items() for kind in ("bare", "service")
        ]
        answers = alternate(peers, args.tokens, args.rounds, warm_ups=1)
    rates = {name: [each["tokens"] / each["seconds"] for each in said] for name, said in answers.items()}
    print(
        f"\n{args.groups} groups x {args.samples} samples x {args.tokens} tokens, log-probabilities on, {args.device}"
    )
    print(f"medians of {args.rounds} rounds")
    print(f"{'case':<14}{'bare tok/s':>12}{'service tok/s':>15}{'service/bare':>14}{'smallest':>10}{'largest':>9}")
    for case in args.cases:
        bare, service = rates[f"{case} bare"], rates[f"{case} service"]
        shares = [ours / theirs for ours, theirs in zip(service, bare, strict=True)]
        print(
            f"{case:<14}{statistics.median(bare):>12.0f}{statistics.median(service):>15.0f}"
            f"{statistics.median(shares):>14.1%}{min(shares):>10.1%}{max(shares):>9.1%}"
        )


if __name__ == "__main__":
    main()
