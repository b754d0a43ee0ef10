"""Runs the controller under cProfile, in CPU time of its main thread: what other programs take does not show.

python -m benchmarks.simulation.profiled FILE --listen 127.0.0.1:0 ...
"""

from __future__ import annotations

import cProfile
import runpy
import sys
import time


def main() -> None:
    """Run the controller with the arguments after FILE, and write the profile there when it ends."""
    file = sys.argv.pop(1)
    profile = cProfile.Profile(time.thread_time)
    try:
        profile.runcall(runpy.run_module, "miles.services.controller", run_name="__main__", alter_sys=True)
    finally:
        profile.dump_stats(file)


if __name__ == "__main__":
    main()
