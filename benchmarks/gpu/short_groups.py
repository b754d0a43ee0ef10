"""Where the time of short groups goes: from the leases to finished, scored and queued groups, against bare SGLang.

    python -m benchmarks.gpu.short_groups --model DIR
    python -m benchmarks.gpu.short_groups --device cpu --python .venv-sglang/bin/python

32 groups of 8 samples of 16 tokens, random prompts of 64 tokens. The peers are those of `benchmarks.gpu.peers`; rounds
alternate between them. `leased`: the client has handed over the last lease. `generate`: of one group, from its lease's
arrival to its last response. `rewards after it`: from there to its last reward. The last group done ends a round.
Without a model a tiny random one answers, whose arithmetic costs next to nothing. With `--profile`, further rounds
follow in which the rollout service and SGLang's front process are sampled (`benchmarks.gpu.sampler`): what their event
loops, which are one thread each, spend their time with.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time

from benchmarks.gpu.models import write_checkpoint
from benchmarks.gpu.peers import WORK, Peer, alternate
from benchmarks.gpu.workload import Workload

SAMPLED_ROUNDS = 20


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a Hugging Face checkpoint")
    add("--groups", type=int, default=32)
    add("--samples", type=int, default=8)
    add("--tokens", type=int, default=16)
    add("--rounds", type=int, default=10)
    add("--kinds", nargs="+", default=["bare", "service"], choices=list(WORK))
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--python", default="", help="interpreter that has SGLang, when it is another one")
    add("--flags", default="{}", help="more SGLang flags, as a JSON object with underscores")
    add("--profile", action="store_true", help="sample the rollout service and SGLang")
    add("--logs", type=pathlib.Path, help="folder for the processes' logs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="short-groups-") as name:
        folder = pathlib.Path(name)
        logs = args.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        load = Workload(
            model=args.model or str(write_checkpoint(folder / "tiny", "tiny", weights=True)),
            groups=args.groups,
            samples=args.samples,
            tokens=args.tokens,
            device=args.device,
            python=args.python,
            flags=json.loads(args.flags),
            profile=str(logs) if args.profile else "",
        )
        peers = [Peer(kind, kind, load, logs) for kind in args.kinds]

        def profile() -> None:
            for peer in peers:
                if peer.name == "service":
                    sampled(peer, load)

        answers = alternate(peers, args.tokens, args.rounds, warm_ups=3, then=profile)
    print(f"\n{args.groups} groups x {args.samples} samples x {args.tokens} tokens, {args.device}; ms")
    print(f"{'':<28}{'median':>9}{'smallest':>10}{'largest':>9}")
    for kind, said in answers.items():
        row(f"{kind}: all done", [each["seconds"] for each in said])
        for stage in said[0].get("stages", ()):
            row(f"  {stage}", [each["stages"][stage] for each in said])


def sampled(peer: Peer, load: Workload, rounds: int = SAMPLED_ROUNDS) -> None:
    """Rounds while the sampled processes are sampled."""
    switches = [pathlib.Path(f"{file}.on") for file in load.samples_of.values()]
    for switch in switches:
        switch.touch()
    time.sleep(0.1)
    for _ in range(rounds if switches else 0):
        peer.measure(load.tokens)
    for switch in switches:
        switch.unlink()
    time.sleep(1.0)


def row(title: str, seconds: list[float]) -> None:
    """A line of the table."""
    times = statistics.median(seconds), min(seconds), max(seconds)
    print(f"{title:<28}{times[0] * 1000:>9.1f}{times[1] * 1000:>10.1f}{times[2] * 1000:>9.1f}")


if __name__ == "__main__":
    main()
