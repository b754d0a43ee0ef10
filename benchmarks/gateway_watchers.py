"""Many watchers of one running job: how long GET /v1/jobs/{id} takes, and what the run loses by them.

    python -m examples.tiny.make
    python -m benchmarks.gateway_watchers --model .cache/tiny/dense

Runs the same job several times on this machine under `miles serve`, by turns alone and with watchers (event streams
that are read to their end) and a poller of the job's record. Prints one table. The targets are p99 <= 50 ms and a
slowdown <= 2 % on 2 cores; run it on a machine that does nothing else. Watchers stand for people elsewhere: they are
one process of low priority that only counts what it is sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from miles.client import GatewayUnreachableError, MilesClient
from miles.launcher.local import free_port

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
START_S = 120.0
NICE = 10
"""Of the watchers."""
POLL_S = 0.05
SERVES_WATCHERS = ("miles.gateway", "miles.services.controller")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, help="folder with model/ and train.jsonl")
    parser.add_argument("--watchers", type=int, default=200, help="event streams open at once")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--watch", metavar="URL", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.watch:
        print(asyncio.run(watch(flags.watch, flags.watchers)))
        return
    if flags.model is None:
        parser.error("--model is needed")
    with tempfile.TemporaryDirectory() as scratch, serving(pathlib.Path(scratch), flags.model) as (url, process):
        run_job(url, process, flags.model, 3, 0)  # what is only slow the first time
        alone, watched = [], []
        for _ in range(flags.rounds):
            alone.append(run_job(url, process, flags.model, flags.steps, 0))
            watched.append(run_job(url, process, flags.model, flags.steps, flags.watchers))
    Console().print(table(flags, alone, watched))


def table(flags: argparse.Namespace, alone: list[dict[str, Any]], watched: list[dict[str, Any]]) -> Table:
    """Medians of the rounds; latencies of all rounds together."""

    def median(runs: list[dict[str, Any]], name: str) -> float:
        return float(statistics.median(run[name] for run in runs))

    title = f"{flags.rounds} rounds of {flags.steps} steps, {os.cpu_count()} cores"
    made = Table("", "alone", f"{flags.watchers} watchers", title=title)
    made.add_row("median step, ms", *(f"{median(runs, 'step_s') * 1e3:.1f}" for runs in (alone, watched)))
    made.add_row("run, s", *(f"{median(runs, 'run_s'):.2f}" for runs in (alone, watched)))
    made.add_row("slowdown of the run", "", f"{median(watched, 'run_s') / median(alone, 'run_s') - 1:+.1%}")
    for name in SERVES_WATCHERS:
        made.add_row(f"{name}, % of a core", *(f"{median(runs, name):.1%}" for runs in (alone, watched)))
    answers = [answer for run in watched for answer in run["answers"]]
    cuts = statistics.quantiles(answers, n=100, method="inclusive")
    for percent in (50, 95, 99):
        made.add_row(f"GET /v1/jobs/{{id}} p{percent}, ms", "", f"{cuts[percent - 1] * 1e3:.1f}")
    made.add_row("requests", "", str(len(answers)))
    made.add_row("events read", "", str(sum(run["events"] for run in watched)))
    return made


@contextlib.contextmanager
def serving(folder: pathlib.Path, model: pathlib.Path) -> Iterator[tuple[str, psutil.Process]]:
    """Every service on this machine; yields the gateway's address and the process that started them."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "miles.cli", "serve", "--device", "cpu", "--run-dir", str(folder / "serve")),
        *("--gateway-port", str(port), "--gateway-allowed-root", str(model.resolve())),
    ]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for_workers(url, process)
            yield url, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_for_workers(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return when every kind of worker is attached."""
    end = time.monotonic() + START_S
    with MilesClient(url) as client:
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(GatewayUnreachableError):
                if {worker["kind"] for worker in client.workers()} >= {"rollout", "trainer", "reward", "weightsync"}:
                    return
            time.sleep(0.5)
    raise TimeoutError(f"waited {START_S:g} s for the services to attach")


def run_job(url: str, services: psutil.Process, model: pathlib.Path, steps: int, watchers: int) -> dict[str, Any]:
    """Run one job to its end; times are those that the run itself recorded."""
    with MilesClient(url) as client:
        job_id = client.submit(job_config(model, steps))["id"]
        before = cpu_seconds(services)
        began = time.monotonic()
        watching = start_watchers(f"{url}/v1/jobs/{job_id}/events", watchers) if watchers else None
        ended = threading.Event()
        answers: list[float] = []
        poller = threading.Thread(target=poll, args=(f"{url}/v1/jobs/{job_id}", answers, ended))
        if watchers:
            poller.start()
        for _ in client.watch(job_id):
            pass
        ended.set()
        wall_s = time.monotonic() - began
        events = int(watching.communicate(timeout=60)[0]) if watching else 0
        if watchers:
            poller.join()
        job = client.job(job_id)
        if job["state"] != "succeeded":
            raise RuntimeError(f"the job has {job['state']}: {job['error']}")
        (series,) = client.metrics(job_id, ["perf/step_time"])["series"]
    used = {name: (seconds - before[name]) / wall_s for name, seconds in cpu_seconds(services).items()}
    step_s = cast("list[float]", series["values"])
    return {"step_s": statistics.median(step_s), "run_s": sum(step_s), "events": events, "answers": answers, **used}


def job_config(model: pathlib.Path, steps: int) -> dict[str, Any]:
    """A job whose steps take some tenths of a second."""
    return {
        "name": "watched",
        "hf_checkpoint": str(model.resolve() / "model"),
        "prompt_data": str(model.resolve() / "train.jsonl"),
        "input_key": "prompt",
        "label_key": "label",
        "rm_type": "exact_match",
        "rollout_batch_size": 16,
        "n_samples_per_prompt": 16,
        "rollout_max_response_len": 6,
        "rollout_skip_special_tokens": True,
        "rollout_dtype": "float32",
        "max_running_requests": 256,
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 4096,
        "lr": 1e-3,
        "num_rollout": steps,
    }


def cpu_seconds(services: psutil.Process) -> dict[str, float]:
    """CPU time so far of the processes that watchers are served by."""
    used = dict.fromkeys(SERVES_WATCHERS, 0.0)
    for child in services.children(recursive=True):
        for name in SERVES_WATCHERS:
            if name in child.cmdline():
                times = child.cpu_times()
                used[name] += times.user + times.system
    return used


def start_watchers(url: str, watchers: int) -> subprocess.Popen[str]:
    """A process of low priority with so many streams; it prints how many events it was sent when all have ended."""
    command = [sys.executable, "-m", "benchmarks.gateway_watchers", "--watch", url, "--watchers", str(watchers)]
    return subprocess.Popen(["nice", "-n", str(NICE), *command], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


async def watch(url: str, watchers: int) -> int:
    """Open so many streams, read them to the end of the job, and return the events in them."""
    host, _, port = httpx.URL(url).netloc.decode().partition(":")
    target = httpx.URL(url).raw_path.decode()
    loop = asyncio.get_running_loop()
    streams = [
        _Stream(f"GET {target} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n") for _ in range(watchers)
    ]
    for stream in streams:
        await loop.create_connection(lambda stream=stream: stream, host, int(port))  # type: ignore[misc]
    await asyncio.gather(*(stream.ended for stream in streams))
    return sum(stream.events for stream in streams)


class _Stream(asyncio.Protocol):
    """Asks for a stream of events and counts what comes."""

    def __init__(self, request: str) -> None:
        self._request = request
        self.events = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self._request.encode())

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"\nevent:")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def poll(url: str, answers: list[float], ended: threading.Event) -> None:
    """Ask for the job's record again and again, and note how long each answer took, in seconds."""
    with httpx.Client() as client:
        while not ended.is_set():
            began = time.perf_counter()
            client.get(url).raise_for_status()
            answers.append(time.perf_counter() - began)
            time.sleep(max(0.0, POLL_S - answers[-1]))


if __name__ == "__main__":
    main()
