"""How long a reward service takes to score bursts of requests, without its gRPC, and with how many processes.

    python -m benchmarks.reward_scoring
    python -m benchmarks.reward_scoring --sleep-ms 5 --workers 8

A round is what a training step brings when its short responses end together: 32 requests of 8 samples at once. One row
for the first rounds of a new service, in which it learns how fast the function is and how many processes it needs, and
one for those after them. `processor`: time that the service and its worker processes computed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np

from miles.reward_sdk.functions import Source
from miles.reward_sdk.scorer import Scorer
from miles.rpc.gen import reward_pb2
from miles.types import Sample, SampleStatus, VersionSpan
from miles.types.convert import sample_to_proto

FIRST_ROUNDS = 10
FUNCTION = "import time\n\ndef scored(sample):\n    {}return float(sample.response == sample.label)\n"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--requests", type=int, default=32)
    add("--samples", type=int, default=8)
    add("--rounds", type=int, default=40)
    add("--pause-ms", type=float, default=200, help="between rounds")
    add("--sleep-ms", type=float, default=0, help="what the function takes for a sample")
    add("--workers", type=int, default=0, help="worker processes at most; 0 means one a core")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reward-scoring-") as folder:
        sleep = f"time.sleep({args.sleep_ms / 1000}); " if args.sleep_ms else ""
        pathlib.Path(folder, "benchmarked_reward.py").write_text(FUNCTION.format(sleep))
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *sys.path])
        asyncio.run(measure(args))


async def measure(args: argparse.Namespace) -> None:
    """Score the rounds with a new scorer."""
    scorer = await Scorer.start([Source("benchmarked_reward.scored")], workers=args.workers)
    requests = [
        reward_pb2.ScoreRequest(samples=[sample_to_proto(response(group, i)) for i in range(args.samples)])
        for group in range(args.requests)
    ]
    seconds, computed, workers = [], [], []
    for _ in range(args.rounds):
        await asyncio.sleep(args.pause_ms / 1000)
        before, began = processor_s(), time.perf_counter()
        scores = await asyncio.gather(*map(scorer.score, requests))
        seconds.append(time.perf_counter() - began)
        assert all(score.HasField("reward") for each in scores for score in each)
        computed.append(processor_s() - before)
        workers.append(len(children()))
    await scorer.close()
    print(f"{args.requests} requests of {args.samples} samples, {args.sleep_ms:g} ms each; medians, ms")
    print(f"{'':<16}{'all scored':>12}{'longest':>10}{'processor':>11}{'processes':>11}")
    for title, rounds in (("first rounds", slice(FIRST_ROUNDS)), ("rounds after", slice(FIRST_ROUNDS, None))):
        took, cost = seconds[rounds], computed[rounds]
        times = (statistics.median(took), max(took), statistics.median(cost))
        print(
            f"{title:<16}{times[0] * 1e3:>12.1f}{times[1] * 1e3:>10.1f}{times[2] * 1e3:>11.1f}{workers[rounds][-1]:>11}"
        )


def response(group: int, index: int) -> Sample:
    """A short response that has ended."""
    return Sample(
        group_id=group,
        index=index,
        prompt="What is 2 + 2?",
        tokens=np.arange(80, dtype=np.int32),
        response_length=16,
        response="4",
        label="4",
        status=SampleStatus.COMPLETED,
        rollout_log_probs=np.zeros(16, np.float32),
        weight_versions=(VersionSpan(0, 0, 16),),
    )


def children() -> list[int]:
    """Process ids of the worker processes."""
    tasks = pathlib.Path("/proc/self/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def processor_s() -> float:
    """Processor time of this process and its workers so far, in seconds."""
    files = [
        file for pid in (os.getpid(), *children()) for file in pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat")
    ]
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


if __name__ == "__main__":
    main()
