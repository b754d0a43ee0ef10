"""Runs a module as a program and samples what its main thread does, while a file exists.

    python benchmarks/gpu/sampler.py OUT -m MODULE ARGUMENTS...

As long as OUT.on exists, the stack of the main thread is read after each millisecond that the process computes, on that
thread itself: another one would see it only where it lets others run. Once the file is gone, OUT has the functions by
the number of samples that were in them (own) and in them or in what they called (all). It needs nothing but the
interpreter, so that it works for SGLang's processes too.
"""

from __future__ import annotations

import collections
import pathlib
import runpy
import signal
import sys
import threading
import time
import types

PERIOD_S, LOOK_S = 0.001, 0.02
LINES = 160

own: collections.Counter[str] = collections.Counter()
every: collections.Counter[str] = collections.Counter()


def note(_: int, frame: types.FrameType | None) -> None:
    """Count the functions of a stack."""
    stack: list[str] = []
    while frame is not None:
        code = frame.f_code
        stack.append(f"{code.co_filename.rpartition('site-packages/')[2]}:{code.co_name}")
        frame = frame.f_back
    own.update(stack[:1])
    every.update(set(stack))


def sample(out: pathlib.Path) -> None:
    """Sample whenever the file says so, for ever."""
    switch = pathlib.Path(f"{out}.on")
    while True:
        while not switch.exists():
            time.sleep(LOOK_S)
        own.clear()
        every.clear()
        began, cpu = time.perf_counter(), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, PERIOD_S, PERIOD_S)
        while switch.exists():
            time.sleep(LOOK_S)
        signal.setitimer(signal.ITIMER_PROF, 0)
        spent = f"{time.perf_counter() - began:.3f} s, of which the process computed {time.process_time() - cpu:.3f} s"
        # Copied in one step each: a last signal may be on its way to the main thread, or be counted there right now.
        own_then, every_then = collections.Counter(dict(own)), collections.Counter(dict(every))
        lines = [f"{sum(own_then.values())} samples in {spent}", "own"]
        lines += [f"{count:>7} {name}" for name, count in own_then.most_common(LINES)]
        lines += ["all", *(f"{count:>7} {name}" for name, count in every_then.most_common(LINES))]
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, note)
    signal.siginterrupt(signal.SIGPROF, False)
    threading.Thread(target=sample, args=(pathlib.Path(sys.argv[1]),), daemon=True).start()
    sys.argv = sys.argv[3:]
    sys.path[0] = ""
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
