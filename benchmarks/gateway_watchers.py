"""Many watchers of one running job: how long GET /v1/jobs/{id} takes, and what the run loses by them.

    python -m benchmarks.gateway_watchers --model .cache/tiny/dense

Runs the same job twice on this machine under `miles serve`: alone, then with watchers (event streams that are read to
their end) and a poller of the job's record. Prints one table. The targets are p99 <= 50 ms and a slowdown <= 2 % on
2 cores; run it on a machine that does nothing else.
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
import time
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from miles.client import GatewayUnreachableError, MilesClient
from miles.launcher.local import free_port

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
START_S = 120.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with model/ and train.jsonl")
    parser.add_argument("--watchers", type=int, default=200, help="event streams open at once")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each run")
    parser.add_argument("--polls-per-s", type=float, default=20.0, help="requests for the job's record a second")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, serving(pathlib.Path(scratch), flags.model) as url:
        run_job(url, flags.model, 3, 0, 0.0)  # what is only slow the first time
        alone = run_job(url, flags.model, flags.steps, 0, 0.0)
        watched = run_job(url, flags.model, flags.steps, flags.watchers, flags.polls_per_s)
    table = Table("", "alone", f"{flags.watchers} watchers", title=f"{flags.steps} steps, {os.cpu_count()} cores")
    table.add_row("median step, ms", f"{alone['step_s'] * 1e3:.1f}", f"{watched['step_s'] * 1e3:.1f}")
    table.add_row("run, s", f"{alone['run_s']:.2f}", f"{watched['run_s']:.2f}")
    table.add_row("slowdown of the run", "", f"{watched['run_s'] / alone['run_s'] - 1:+.1%}")
    for percent in (50, 95, 99):
        table.add_row(f"GET /v1/jobs/{{id}} p{percent}, ms", "", f"{watched[f'p{percent}_s'] * 1e3:.1f}")
    table.add_row("events read", "", str(watched["events"]))
    Console().print(table)


@contextlib.contextmanager
def serving(folder: pathlib.Path, model: pathlib.Path) -> Iterator[str]:
    """Every service on this machine; yields the gateway's address."""
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
            yield url
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


def run_job(url: str, model: pathlib.Path, steps: int, watchers: int, polls_per_s: float) -> dict[str, float]:
    """Run one job to its end; times are those that the run itself recorded."""
    config: dict[str, Any] = {
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
        "lr": 1e-3,
        "num_rollout": steps,
    }
    with MilesClient(url) as client:
        job_id = client.submit(config)["id"]
        answers, events = asyncio.run(watch(url, job_id, watchers, polls_per_s))
        job = client.job(job_id)
        if job["state"] != "succeeded":
            raise RuntimeError(f"the job has {job['state']}: {job['error']}")
        (series,) = client.metrics(job_id, ["perf/step_time"])["series"]
    measured = {"step_s": statistics.median(series["values"]), "run_s": sum(series["values"]), "events": float(events)}
    if len(answers) > 1:
        cuts = statistics.quantiles(answers, n=100, method="inclusive")
        measured |= {f"p{percent}_s": cuts[percent - 1] for percent in (50, 95, 99)}
    return measured


async def watch(url: str, job_id: str, watchers: int, polls_per_s: float) -> tuple[list[float], int]:
    """Follow a job to its end with so many watchers; returns times of polls in seconds, and events read by all."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        streams = [asyncio.create_task(read_events(client, job_id)) for _ in range(max(1, watchers))]
        answers: list[float] = []
        if polls_per_s:
            poller = asyncio.create_task(poll(client, job_id, 1 / polls_per_s, answers))
            counts = await asyncio.gather(*streams)
            poller.cancel()
            await asyncio.gather(poller, return_exceptions=True)
        else:
            counts = await asyncio.gather(*streams)
    return answers, sum(counts) if watchers else 0


async def read_events(client: httpx.AsyncClient, job_id: str) -> int:
    """Read one stream to the end of the job; returns the events in it."""
    count = 0
    async with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            count += line.startswith("event:")
    return count


async def poll(client: httpx.AsyncClient, job_id: str, every_s: float, answers: list[float]) -> None:
    """Ask for the job's record again and again, and note how long each answer took, in seconds."""
    while True:
        began = time.perf_counter()
        (await client.get(f"/v1/jobs/{job_id}")).raise_for_status()
        answers.append(time.perf_counter() - began)
        await asyncio.sleep(max(0.0, every_s - answers[-1]))


if __name__ == "__main__":
    main()
