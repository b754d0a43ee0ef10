"""Everything that a process has started is killed with it, whatever session it is in."""

from __future__ import annotations

import subprocess
import sys

import psutil

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
