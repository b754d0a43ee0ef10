"""Runs a module as a program and samples what its main thread does, while a file exists.

    python benchmarks/gpu/sampler.py OUT -m MODULE ARGUMENTS...

As long as OUT.on exists, the stack of the main thread is read about a thousand times a second. Once the file is gone,
OUT has the functions by the number of samples that were in them (own) and in them or in what they called (all). It
needs nothing but the interpreter, so that it works for SGLang's processes too.
"""

from __future__ import annotations

import collections
import pathlib
import runpy
import sys
import threading
import time

PERIOD_S, LOOK_S = 0.001, 0.02
LINES = 120


def sample(out: pathlib.Path, thread_id: int | None) -> None:
    """Sample a thread whenever the file says so, for ever."""
    switch = pathlib.Path(f"{out}.on")
    while True:
        own: collections.Counter[str] = collections.Counter()
        every: collections.Counter[str] = collections.Counter()
        began, cpu = time.perf_counter(), time.process_time()
        while switch.exists():
            frame = sys._current_frames().get(thread_id or 0)
            stack: list[str] = []
            while frame is not None:
                code = frame.f_code
                stack.append(f"{code.co_filename.rpartition('site-packages/')[2]}:{code.co_name}")
                frame = frame.f_back
            own.update(stack[:1])
            every.update(set(stack))
            time.sleep(PERIOD_S)
        if own:
            spent = (
                f"{time.perf_counter() - began:.3f} s, of which the process computed {time.process_time() - cpu:.3f} s"
            )
            lines = [f"{sum(own.values())} samples in {spent}", "own"]
            lines += [f"{count:>7} {name}" for name, count in own.most_common(LINES)]
            lines += ["all", *(f"{count:>7} {name}" for name, count in every.most_common(LINES))]
            out.write_text("\n".join(lines) + "\n")
        time.sleep(LOOK_S)


if __name__ == "__main__":
    arguments = (pathlib.Path(sys.argv[1]), threading.main_thread().ident)
    threading.Thread(target=sample, args=arguments, daemon=True).start()
    sys.argv = sys.argv[3:]
    sys.path[0] = ""
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
