"""Simulation of thousands of rollouts with a real controller.

    python -m benchmarks.simulate plan                     # throughput and staleness against the number of rollouts
    python -m benchmarks.simulate controller               # groups per second that one controller can handle
    python -m benchmarks.simulate step                     # what a small run waits for its controller in a step

`plan` drives the controller's state machines (admission and load balance) in virtual time: rollouts take as long as
long-tailed response lengths say, the trainer and weight updates a fixed time. It prints a table for each staleness
bound; with --scale-batch the batch and the trainer grow with the rollouts, else both are fixed.

`controller` starts a real controller process and Redis, and stand-ins for any number of rollouts over real gRPC. Each
takes as long for a group as makes all of them finish --offered groups per second together, at least 0.2 s. It prints
how long it took from the first rollout's being asked to load the job until all had work, and the CPU time of controller
and stand-ins in it; how many groups they finished, what share of a processor each side took for it, reports and
heartbeats included, and the controller's limit: the groups per second that would take a whole one. Beside that stands
what grpc.aio alone takes for a lease and its answer on as many streams. --profile FILE writes a cProfile of it.

`step` runs a synchronous job of one rollout and one trainer in the same way, and prints how long each phase of a step
began after the one before had ended: time in which neither of the two does anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import psutil

from benchmarks.simulation.bare_streams import cpu_us_of_a_pair
from benchmarks.simulation.lengths import Lengths
from benchmarks.simulation.stand_ins import Rollouts, Trainer, WeightSync, stand_ins
from benchmarks.simulation.step_gaps import GAPS, Moments
from benchmarks.simulation.virtual import Cluster, Simulation
from miles.queue import RedisServer
from miles.rpc import connect
from miles.rpc.gen import controller_pb2, controller_pb2_grpc
from miles.rpc.server import WATCHED_PID_ENVIRONMENT

_SAMPLES = 8
_START_S = 60.0
_CONNECT_S = 600.0


# -- plan --------------------------------------------------------------------------------------------------------------


def plan(flags: argparse.Namespace) -> None:
    """Print the table of every cluster asked for."""
    lengths = Lengths(flags.median_tokens, flags.sigma, flags.limit_tokens, _SAMPLES, flags.tokens_per_s)
    print(f"a group takes {lengths.mean_group_s:.0f} s on average; a rollout generates {flags.slots} groups at once\n")
    header = ("rollouts", "batch", "staleness bound", "groups/s", "rollouts busy", "trainer busy", "mean staleness")
    table = Table((*header, "max staleness", "step s", "µs/group"))
    for rollouts in flags.rollouts:
        batch = max(flags.batch, rollouts * flags.slots) if flags.scale_batch else flags.batch
        for staleness in flags.staleness:
            cluster = Cluster(
                rollouts=rollouts,
                slots=flags.slots,
                batch_size=batch,
                max_staleness=staleness,
                train_s=flags.train_s,
                export_s=flags.export_s,
                swap_s=flags.swap_s,
                steps=flags.steps,
                lengths=lengths,
            )
            began = time.process_time()
            found = Simulation(cluster).run()
            cost_s = (time.process_time() - began) / (batch * flags.steps)
            table.add(
                *(f"{rollouts}", f"{batch}", f"{staleness}", f"{found.groups_per_s:.2f}", f"{found.busy:.0%}"),
                *(f"{found.trainer_busy:.0%}", f"{found.mean_staleness:.2f}", f"{found.max_staleness}"),
                *(f"{found.step_s:.0f}", f"{cost_s * 1e6:.0f}"),
            )


# -- controller --------------------------------------------------------------------------------------------------------


async def controller(flags: argparse.Namespace) -> None:
    """Print the table of every number of rollouts asked for."""
    header = ("rollouts", "connected after s", "CPU s: controller", "stand-ins", "groups/s", "busy: controller")
    header = (*header, "stand-ins", "µs/group", "bare grpc.aio", "limit groups/s", "mean staleness", "MiB")
    table = Table(header)
    with tempfile.TemporaryDirectory() as folder:
        for rollouts in flags.rollouts:
            table.add(*await _measure(pathlib.Path(folder) / str(rollouts), rollouts, flags))


async def _measure(folder: pathlib.Path, rollouts: int, flags: argparse.Namespace) -> tuple[str, ...]:
    folder.mkdir()
    moments = Moments()
    groups = Rollouts(flags.slots, max(0.2, rollouts * flags.slots / flags.offered), moments)
    with RedisServer(folder / "redis") as redis:
        async with (
            _controller_process(folder, redis.url, flags.profile) as (process, address),
            stand_ins(address, rollouts, groups, Trainer(flags.train_s, moments), WeightSync(moments)),
        ):
            await _submit(address, _job(folder, rollouts * flags.slots))
            await groups.asked.wait()
            connecting = _Stretch(process, groups)
            await _until_full(groups, rollouts)
            connected = connecting.end()
            running = _Stretch(process, groups)
            await asyncio.sleep(flags.seconds)
            ran = running.end()
            memory = process.memory_info().rss / 2**20
    bare_us = await cpu_us_of_a_pair(rollouts, flags.seconds, groups.lease_bytes)
    staleness = _staleness(folder / "run" / "metrics.jsonl")
    return (
        *(f"{rollouts}", f"{connected.wall_s:.1f}", f"{connected.cpu_s:.1f}", f"{connected.stand_ins_s:.1f}"),
        *(f"{ran.groups / ran.wall_s:.0f}", f"{ran.cpu_s / ran.wall_s:.0%}", f"{ran.stand_ins_s / ran.wall_s:.0%}"),
        *(f"{ran.cpu_s / max(1, ran.groups) * 1e6:.0f}", f"{bare_us:.0f}", f"{ran.groups / ran.cpu_s:.0f}"),
        *(f"{staleness:.2f}", f"{memory:.0f}"),
    )


async def _submit(address: str, job: Mapping[str, object]) -> None:
    async with connect(address) as channel:
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        await stub.SubmitJob(controller_pb2.SubmitJobRequest(config_json=json.dumps(job)), timeout=_START_S)


@dataclasses.dataclass(frozen=True, slots=True)
class _Took:
    """What a stretch of time took. Times in seconds."""

    wall_s: float
    cpu_s: float
    """CPU time of the controller."""
    stand_ins_s: float
    """CPU time of the stand-ins, which are this process."""
    groups: int
    """Groups finished in it."""


class _Stretch:
    """Measures from when it is made to `end`."""

    def __init__(self, controller: psutil.Process, groups: Rollouts) -> None:
        self._controller, self._groups = controller, groups
        self._began = self._now()

    def end(self) -> _Took:
        """Return what it took until now."""
        wall, cpu, own, groups = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return _Took(wall, cpu, own, int(groups))

    def _now(self) -> tuple[float, float, float, float]:
        return time.monotonic(), _cpu_s(self._controller), time.process_time(), self._groups.finished


@contextlib.asynccontextmanager
async def _controller_process(
    folder: pathlib.Path, redis_url: str, profile: str | None
) -> AsyncIterator[tuple[psutil.Process, str]]:
    address_file = folder / "address"
    module = ["benchmarks.simulation.profiled", profile] if profile else ["miles.services.controller"]
    command = [sys.executable, "-m", *module, "--listen", "127.0.0.1:0"]
    command += ["--redis-url", redis_url, "--address-file", str(address_file)]
    environment = {**os.environ, WATCHED_PID_ENVIRONMENT: str(os.getpid())}
    with (folder / "controller.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=environment)
    try:
        end = time.monotonic() + _START_S
        while not address_file.exists():
            if process.returncode is not None or time.monotonic() > end:
                raise RuntimeError(f"the controller did not start:\n{(folder / 'controller.log').read_text()}")
            await asyncio.sleep(0.05)
        yield psutil.Process(process.pid), address_file.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM if profile else signal.SIGKILL)
        await process.wait()


async def _until_full(groups: Rollouts, rollouts: int) -> None:
    end = time.monotonic() + _CONNECT_S
    while groups.full < rollouts:
        if time.monotonic() > end:
            raise TimeoutError(f"{groups.full} of {rollouts} rollouts had work after {_CONNECT_S:g} s")
        await asyncio.sleep(0.1)


def _job(folder: pathlib.Path, at_once: int) -> dict[str, object]:
    """A job whose staleness bound lets rollouts be busy that hold so many groups at once."""
    from examples.tiny.make import make_tokenizer

    make_tokenizer().save_pretrained(folder / "model")
    prompts = "".join(json.dumps({"prompt": "31415>", "label": "11345"}) + "\n" for _ in range(64))
    (folder / "train.jsonl").write_text(prompts)
    return {
        "name": "simulated",
        "run_dir": str(folder / "run"),
        "hf_checkpoint": str(folder / "model"),
        "prompt_data": str(folder / "train.jsonl"),
        "input_key": "prompt",
        "label_key": "label",
        "rm_type": "exact_match",
        "rollout_batch_size": max(8, at_once // 4),
        "n_samples_per_prompt": _SAMPLES,
        "num_steps_per_rollout": 1,
        "rollout_max_response_len": 16,
        "num_rollout": 1_000_000,
        "max_weight_staleness": 8,
        "lr": 1e-6,
        "device": "cpu",
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _staleness(metrics: pathlib.Path) -> float:
    name = "rollout/fully_async/avg_staleness"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    found = [line[name] for line in lines if name in line]
    return found[-1] if found else float("nan")


# -- step --------------------------------------------------------------------------------------------------------------


async def step(flags: argparse.Namespace) -> None:
    """Print what a synchronous run of one rollout and one trainer waits for its controller in a step."""
    moments = Moments()
    groups = Rollouts(flags.groups, flags.group_s, moments)
    with tempfile.TemporaryDirectory() as name, RedisServer(pathlib.Path(name) / "redis") as redis:
        folder = pathlib.Path(name)
        job = _job(folder, 0) | {"rollout_batch_size": flags.groups, "max_weight_staleness": 0}
        async with (
            _controller_process(folder, redis.url, flags.profile) as (process, address),
            stand_ins(address, 1, groups, Trainer(flags.train_s, moments), WeightSync(moments)),
        ):
            await _submit(address, job)
            await _until_full(groups, 1)
            running = _Stretch(process, groups)
            await asyncio.sleep(flags.seconds)
            ran = running.end()
    gaps = moments.gaps_s()[2:]
    steps = ran.groups / flags.groups
    table = Table(("steps", "step ms", "controller CPU ms", *GAPS, "all gaps ms"))
    for share, what in ((0.5, "median"), (0.9, "p90")):
        of_each = [statistics.quantiles(gap, n=10)[round(share * 10) - 1] * 1e3 for gap in zip(*gaps, strict=True)]
        whole = statistics.quantiles(map(sum, gaps), n=10)[round(share * 10) - 1] * 1e3
        known = (f"{len(gaps)}", f"{ran.wall_s / steps * 1e3:.1f}", f"{ran.cpu_s / steps * 1e3:.1f}")
        table.add(*(known if what == "median" else ("", "", what)), *(f"{gap:.1f}" for gap in of_each), f"{whole:.1f}")


# -- both --------------------------------------------------------------------------------------------------------------


class Table:
    """Prints each row when it is there."""

    def __init__(self, header: Sequence[str]) -> None:
        self._widths = [max(8, len(heading)) for heading in header]
        self.add(*header)

    def add(self, *cells: str) -> None:
        """Print a row."""
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True)), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    add = modes.add_parser("plan", help="throughput and staleness in virtual time").add_argument
    add("--rollouts", type=int, nargs="+", default=[1, 16, 256, 1024, 4096])
    add("--staleness", type=int, nargs="+", default=[0, 1, 4], help="bounds to compare")
    add("--batch", type=int, default=512, help="prompts of a step")
    add("--scale-batch", action="store_true", help="let a batch be what the rollouts generate at once, if more")
    add("--slots", type=int, default=8, help="groups that a rollout generates at once")
    add("--train-s", type=float, default=60.0, help="time of a training step")
    add("--export-s", type=float, default=2.0, help="time that the trainer stands still for an update")
    add("--swap-s", type=float, default=5.0, help="time until every rollout has it")
    add("--steps", type=int, default=12)
    add("--median-tokens", type=float, default=2000.0, help="median response length")
    add("--sigma", type=float, default=1.0, help="of the logarithm of the length")
    add("--limit-tokens", type=int, default=32_768)
    add("--tokens-per-s", type=float, default=50.0, help="speed of one response")
    add = modes.add_parser("controller", help="what one controller process can handle").add_argument
    add("--rollouts", type=int, nargs="+", default=[1, 16, 256, 1024, 4096])
    add("--slots", type=int, default=8)
    add("--offered", type=float, default=1000.0, help="groups/s of all rollouts together, if the controller keeps up")
    add("--train-s", type=float, default=0.1)
    add("--seconds", type=float, default=8.0, help="time of a measurement")
    add("--profile", metavar="FILE", help="profile the controller; slows it down")
    add = modes.add_parser("step", help="what a small synchronous run waits for its controller in a step").add_argument
    add("--groups", type=int, default=32, help="groups of a step, all at once on one rollout")
    add("--group-s", type=float, default=0.05)
    add("--train-s", type=float, default=0.02)
    add("--seconds", type=float, default=15.0, help="time of the measurement")
    add("--profile", metavar="FILE", help="profile the controller; slows it down")
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    if flags.mode == "plan":
        plan(flags)
    else:
        asyncio.run(controller(flags) if flags.mode == "controller" else step(flags))


if __name__ == "__main__":
    main()
