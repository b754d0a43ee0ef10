"""Starts the clients of the gateway as processes, and talks to the watchers."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def watching(url: str, count: int) -> Iterator[subprocess.Popen[str]]:
    """A process for the event streams, of a session of its own."""
    command = [*client_command("watchers", url), "--count", str(count)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def client_command(name: str, url: str) -> list[str]:
    """How a client of the gateway is started."""
    parsed = httpx.URL(url)
    module = f"benchmarks.gateway_clients.{name}"
    return [sys.executable, "-m", module, "--host", parsed.host, "--port", str(parsed.port)]


def open_streams(url: str, job_id: str, watchers: subprocess.Popen[str]) -> None:
    """Open every stream after the newest event: who has watched so far has its history."""
    newest = re.findall(r"^id: (\S+)$", httpx.get(f"{url}/v1/jobs/{job_id}/events?follow=false", timeout=60).text, re.M)
    tell(watchers, {"open": f"/v1/jobs/{job_id}/events?after={newest[-1]}"})


def tell(process: subprocess.Popen[str], order: dict[str, Any]) -> dict[str, Any]:
    """Give an order and return the answer."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    return answer_of(process)


def answer_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that a client prints. Raises RuntimeError when it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the process of the watchers has ended; what it wrote above says why")
    answer: dict[str, Any] = json.loads(line)
    return answer
