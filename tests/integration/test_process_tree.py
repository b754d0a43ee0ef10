"""Everything that a process has started is killed with it, whatever session it is in."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil

from miles.rpc import ExitCode

PROGRAM = """
import subprocess, sys
from miles.launcher.stopping.process_tree import kill_descendants
sleeper = "import time; time.sleep(60)"
parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{sleeper}'], start_new_session=True); "
parent += "print(p.pid, flush=True); p.wait()"
child = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
kill_descendants(5.0)
"""


def test_children_of_children_in_sessions_of_their_own_are_killed() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    pids = [int(word) for word in ended.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


INTERRUPTED = """
import asyncio, subprocess, sys
from miles.launcher.stopping.interrupts import Interrupts
async def main():
    Interrupts(lambda: None)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    print(child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_a_second_ctrl_c_kills_everything_also_when_nobody_reads_the_output_any_more() -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    child = psutil.Process(int(program.stdout.readline()))
    program.stdout.close()  # as when Ctrl-C in a terminal ends the program that the output is piped to
    program.send_signal(signal.SIGINT)
    time.sleep(0.3)  # a press that comes twice counts once
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=30)
    assert (program.returncode, errors) == (ExitCode.INTERRUPTED, "")
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
