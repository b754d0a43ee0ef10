"""Many watchers of one running job: latency of GET /v1/jobs/{id}, and the slowdown of the run.

    python -m examples.tiny.make
    python -m benchmarks.gateway_watchers --model .cache/tiny/dense

Runs one job on this machine under `miles serve`, by turns without watchers and with them: event streams that are read,
and a client that asks for the job's record 20 times a second (200 pages that ask every 10 s). Every step falls into
one stretch or the other, and a stretch with watchers is compared with those just before and after it. At the end the
job is cancelled while all watch. Takes about three minutes. The targets are p99 <= 50 ms and a slowdown <= 2 % on 2
cores; run it on a machine that does nothing else.

Watchers stand for people elsewhere: one process at the lowest priority that only counts what it is sent. What it uses
all the same is the load generator's, and listed apart from what the services use.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.gateway_clients.processes import answer_of, client_command, open_streams, tell, watching
from benchmarks.gateway_clients.usage import SERVING, Usage
from miles.addresses import free_port
from miles.client import GatewayUnreachableError, MilesClient

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
START_S = 120.0
FIRST_STEPS = 5
"""Steps before the first measurement."""
POLL_S = 0.05
TARGET_S = 0.05
WIDTH = 150
"""Columns of the table, also where the output goes to a file."""


@dataclasses.dataclass(slots=True)
class Stretch:
    """A part of the run with watchers or without, and the CPU seconds that processes used in it."""

    watched: bool
    begin_unix_s: float
    end_unix_s: float = 0.0
    cpu_s: dict[str, float] = dataclasses.field(default_factory=dict)
    step_s: list[float] = dataclasses.field(default_factory=list)
    """Wall time of each step that lies in it as a whole."""

    @property
    def wall_s(self) -> float:
        return self.end_unix_s - self.begin_unix_s


@dataclasses.dataclass(slots=True)
class Measured:
    """What one benchmark found."""

    stretches: list[Stretch] = dataclasses.field(default_factory=list)
    answers: list[tuple[float | None, float]] = dataclasses.field(default_factory=list)
    """Seconds of each request: until the answer had arrived, until it was read."""
    events: int = 0
    cancel_s: float = 0.0
    within_target: float = 0.0
    """Share of requests for the record that the gateway counted as answered within the target."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with model/ and train.jsonl")
    parser.add_argument("--watchers", type=int, default=200, help="event streams open at once")
    parser.add_argument("--rounds", type=int, default=7, help="stretches with watchers")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a stretch")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, serving(pathlib.Path(scratch), flags.model) as (url, services):
        measured = measure(flags, url, services)
    Console(width=max(WIDTH, Console().width)).print(table(flags, measured))


def measure(flags: argparse.Namespace, url: str, services: psutil.Process) -> Measured:
    """Run the job and the clients."""
    measured = Measured()
    with MilesClient(url, timeout_s=60) as client, watching(url, flags.watchers) as watchers:
        job_id = client.submit(job_config(flags.model))["id"]
        wait_for_step(client, job_id, FIRST_STEPS)
        open_streams(url, job_id, watchers)  # what is only slow the first time
        tell(watchers, {"close": True})
        usage = Usage(services, watchers)
        for number in range(2 * flags.rounds + 1):
            stretch = Stretch(number % 2 == 1, time.time())
            if stretch.watched:
                open_streams(url, job_id, watchers)
            with polling(url, job_id, usage, measured) if stretch.watched else contextlib.nullcontext():
                stretch.begin_unix_s = time.time()
                before = usage.seconds()
                time.sleep(flags.seconds)
                stretch.cpu_s = {name: used - before[name] for name, used in usage.seconds().items()}
                stretch.end_unix_s = time.time()
            if stretch.watched:
                measured.events += tell(watchers, {"close": True})["events"]
            measured.stretches.append(stretch)
            check_running(client, job_id)
        count_steps(client.metrics(job_id, ["perf/step_time"]), measured.stretches)
        measured.within_target = share_within(url, TARGET_S)
        open_streams(url, job_id, watchers)
        began = time.time()
        client.cancel(job_id)
        measured.cancel_s = answer_of(watchers)["ended_unix_s"] - began
    return measured


def table(flags: argparse.Namespace, measured: Measured) -> Table:
    """What was found, a row each, with what the row means."""
    alone = [stretch for stretch in measured.stretches if not stretch.watched]
    watched = [stretch for stretch in measured.stretches if stretch.watched]
    title = f"{flags.watchers} watchers of one job on {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
    made = Table("", "alone", "watched", "what it is", title=title)
    steps = [[step for stretch in part for step in stretch.step_s] for part in (alone, watched)]
    medians = (f"{statistics.median(part) * 1e3:.1f}" for part in steps)
    made.add_row("step, ms", *medians, f"median wall time of {len(steps[0])} and {len(steps[1])} steps")
    against = "step of a stretch against its two neighbours: median (least ... most)"
    made.add_row("slowdown of a step", "", spread(slowdowns(measured.stretches)), against)
    noise = "the same among stretches without watchers: what this cannot tell from 0"
    made.add_row("noise of that", spread(slowdowns(alone)), "", noise)
    for name in (*SERVING, "load generator"):
        used = (f"{share(part, name):.1%}" for part in (alone, watched))
        made.add_row(f"{name}, % of a core", *used, "CPU time / wall time")
    added = sum(share(watched, name) - share(alone, name) for name in SERVING) / (os.cpu_count() or 1)
    made.add_row("CPU taken from the run", "", f"{added:+.1%}", "of all cores, by these services, for watchers")
    made.add_section()
    for place, until in enumerate(("its answer had arrived in the kernel", "the client, on these cores too, read it")):
        known = [answer[place] for answer in measured.answers]
        for name, text in quantiles([value for value in known if value is not None]).items():
            made.add_row(f"GET /v1/jobs/{{id}} {name}, ms", "", text, f"from sending the request until {until}")
    made.add_row("answered within 50 ms", "", f"{measured.within_target:.2%}", "by the gateway's own count")
    made.add_section()
    made.add_row("requests", "", str(len(measured.answers)), "for the job's record")
    made.add_row("events", "", str(measured.events), "read by all watchers together")
    made.add_row(
        "cancel, s", "", f"{measured.cancel_s:.2f}", "until every stream had ended; the step in hand ends first"
    )
    return made


def slowdowns(stretches: Sequence[Stretch]) -> list[float]:
    """How much longer a step of every second stretch takes than one of its two neighbours, where all have steps."""
    found = []
    for i in range(1, len(stretches) - 1, 2):
        three = [stretches[j].step_s for j in (i - 1, i, i + 1)]
        if all(three):
            before, this, after = map(statistics.median, three)
            found.append(this / ((before + after) / 2) - 1)
    return found


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    if not values:
        return "too few stretches"
    return f"{statistics.median(values):+.1%} ({min(values):+.1%} ... {max(values):+.1%})"


def share(stretches: Sequence[Stretch], name: str) -> float:
    """CPU time of a process in these stretches, as a share of one core."""
    return sum(stretch.cpu_s[name] for stretch in stretches) / sum(stretch.wall_s for stretch in stretches)


def quantiles(seconds: Sequence[float]) -> dict[str, str]:
    """Some quantiles by name, in milliseconds."""
    if len(seconds) < 2:
        return {"p99": "unknown"}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    named = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "most": max(seconds)}
    return {name: f"{value * 1e3:.1f}" for name, value in named.items()}


def count_steps(answer: dict[str, Any], stretches: Sequence[Stretch]) -> None:
    """Note each step in the stretch in which it began and ended. Raises RuntimeError when there are none of a kind."""
    (series,) = answer["series"]
    ends = series["unix_s"]
    for begin, end in itertools.pairwise(ends):
        for stretch in stretches:
            if stretch.begin_unix_s <= begin and end <= stretch.end_unix_s:
                stretch.step_s.append(end - begin)
    if {stretch.watched for stretch in stretches if stretch.step_s} != {False, True}:
        raise RuntimeError("steps are longer than stretches; give more --seconds, or have the machine do nothing else")


@contextlib.contextmanager
def serving(folder: pathlib.Path, model: pathlib.Path) -> Iterator[tuple[str, psutil.Process]]:
    """Every service on this machine; yields the gateway's address and the process that started them."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "miles.cli", "serve", "--device", "cpu", "--run-dir", str(folder / "serve")),
        *("--gateway-port", str(port), "--gateway-allowed-root", str(model.resolve())),
        *("--gateway-allowed-root", str(folder)),
    ]
    log_path = folder / "serve.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for_workers(url, process, log_path)
            yield url, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(90)


def wait_for_workers(url: str, process: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    """Return when every kind of worker is attached. Raises RuntimeError when the services end, or TimeoutError."""
    end = time.monotonic() + START_S
    with MilesClient(url) as client:
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RuntimeError(f"the services ended with {process.returncode}:\n{log.read_text()[-2000:]}")
            with contextlib.suppress(GatewayUnreachableError):
                if {worker["kind"] for worker in client.workers()} >= {"rollout", "trainer", "reward", "weightsync"}:
                    return
            time.sleep(0.5)
    raise TimeoutError(f"waited {START_S:g} s for the services to attach:\n{log.read_text()[-2000:]}")


def wait_for_step(client: MilesClient, job_id: str, step: int) -> None:
    """Return once the job has taken so many steps."""
    end = time.monotonic() + START_S
    while (client.metrics(job_id, ["perf/step_time"])["newest_step"] or 0) < step:
        check_running(client, job_id)
        if time.monotonic() > end:
            raise TimeoutError(f"waited {START_S:g} s for step {step} of job {job_id}")
        time.sleep(0.5)


def check_running(client: MilesClient, job_id: str) -> None:
    """Raise RuntimeError when the job has ended."""
    job = client.job(job_id)
    if job["ended_at"] is not None:
        raise RuntimeError(f"the job has {job['state']} before the end of the measurement: {job['error']}")


def job_config(model: pathlib.Path) -> dict[str, Any]:
    """A job whose steps take some tenths of a second; it would go on for hours."""
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
        "lr": 1e-4,
        "num_rollout": 100_000,
    }


@contextlib.contextmanager
def polling(url: str, job_id: str, usage: Usage, measured: Measured) -> Iterator[None]:
    """A process that asks for the job's record meanwhile."""
    command = [*client_command("poller", url), "--path", f"/v1/jobs/{job_id}", "--every-s", str(POLL_S)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(0.5)  # its start is not what is measured
        usage.add(process)
        yield
        usage.remove_last()
        answers, _ = process.communicate(timeout=30)
        measured.answers += [(arrived, read) for arrived, read in json.loads(answers)]
    finally:
        process.kill()
        process.wait()


def share_within(url: str, seconds: float) -> float:
    """Share of the requests for a job's record that the gateway has answered within so many seconds, by its count."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    name = r'^miles_gateway_request_seconds_{}\{{{}method="GET",route="/v1/jobs/\{{job_id\}}"\}} (\S+)$'
    within = re.search(name.format("bucket", f'le="{seconds}",'), text, re.M)
    counted = re.search(name.format("count", ""), text, re.M)
    if within is None or counted is None:
        raise RuntimeError("the gateway's metrics have no miles_gateway_request_seconds for jobs")
    return float(within[1]) / float(counted[1])


if __name__ == "__main__":
    main()
