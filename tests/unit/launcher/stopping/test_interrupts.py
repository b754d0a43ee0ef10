"""The signals that stop a program, and those that must not kill it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

PROGRAM = """
import asyncio, signal, sys
# Whatever the tests were started with: under nohup all that they start ignores hang-ups.
signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in sys.argv else signal.SIG_DFL)
from miles.launcher.stopping.interrupts import Interrupts
async def run():
    stopped = asyncio.Event()
    Interrupts(stopped.set)
    print("ready", flush=True)
    await stopped.wait()
    print("stopping", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
asyncio.run(run())
print("saved", flush=True)
"""
SERVICE = """
import asyncio, signal, sys
# Whatever the tests were started with: under nohup all that they start ignores hang-ups.
signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in sys.argv else signal.SIG_DFL)
from miles.rpc import main
async def serve():
    print("ready", flush=True)
    try:
        await asyncio.to_thread(sys.stdin.readline)
    finally:
        print("saved", flush=True)
main(serve)
"""


def outcome(program: str, signals: Sequence[signal.Signals], *arguments: str) -> tuple[int, list[str]]:
    """Return exit code and output of a program that gets the signals, and then its input."""
    started = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    lines = []
    for number, each in enumerate(signals):
        started.send_signal(each)
        if number == 0 and program is PROGRAM and not (arguments and each is signal.SIGHUP):
            lines.append(started.stdout.readline().strip())
    output, _ = started.communicate("\n", timeout=60)
    return started.returncode, [*lines, *output.split()]


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGHUP],
        [signal.SIGTERM],
        [signal.SIGHUP, signal.SIGHUP],
        [signal.SIGHUP, signal.SIGTERM],
        [signal.SIGTERM, signal.SIGHUP],
    ],
)
def test_a_terminal_that_hangs_up_stops_a_run_in_order(signals: list[signal.Signals]) -> None:
    assert outcome(PROGRAM, signals) == (0, ["stopping", "saved"])


def test_a_hangup_that_was_ignored_stays_ignored() -> None:
    assert outcome(PROGRAM, [signal.SIGHUP, signal.SIGTERM], "nohup") == (0, ["stopping", "saved"])
    assert outcome(SERVICE, [signal.SIGHUP], "nohup") == (0, ["saved"])


def test_a_service_ends_in_order_at_a_hangup() -> None:
    assert outcome(SERVICE, [signal.SIGHUP]) == (0, ["saved"])
