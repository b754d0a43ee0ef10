"""Runs Python programs in forks of a process that has imported what takes seconds to import, one fork per rank.

Reads requests from standard input, a JSON object a line, and answers each with a line, the exit code:

arguments       what would follow `python` on a command line: a file, -m and a module, or -c and code; its arguments
ranks, port     how many processes, and the port on which rank 0 meets the others
stdout, stderr  files that all ranks write to

Programs have this process's environment, and torchrun's variables where there are several ranks.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import runpy
import sys
from typing import Any

BACKEND = "megatron" if "MILES_TEST_MEGATRON_CPU" in os.environ else "fsdp"
MODELS = {"megatron": "megatron.bridge", "fsdp": "transformers.models.llama.modeling_llama"}
FORK = multiprocessing.get_context("fork")


def main() -> None:
    """Answer requests until there are no more."""
    for name in ("backend_cases", f"miles.services.trainer.backends.{BACKEND}.backend", MODELS[BACKEND]):
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "forks lack every thread but the one that forks"
    while line := sys.stdin.readline():
        print(run(json.loads(line)), flush=True)


def run(request: dict[str, Any]) -> int:
    """Run a program on all ranks; the first one that fails ends the others."""
    processes = [FORK.Process(target=run_rank, args=(request, rank)) for rank in range(request["ranks"])]
    for process in processes:
        process.start()
    left = {process.sentinel: process for process in processes}
    code = 0
    while left:
        for sentinel in multiprocessing.connection.wait(list(left)):
            process = left.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            if process.exitcode and not code:
                code = process.exitcode
                for other in left.values():
                    other.kill()
    return code


def run_rank(request: dict[str, Any], rank: int) -> None:
    """Become a rank of the program."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND), number)
    if request["ranks"] > 1:
        local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "LOCAL_WORLD_SIZE": request["ranks"]}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}
        os.environ.update({name: str(value) for name, value in {**local, **meeting}.items()})
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__")
        return
    code, sys.argv = (
        (rest[0], ["-c", *rest[1:]]) if first == "-c" else (pathlib.Path(first).read_text(), [first, *rest])
    )
    # Not by runpy: a process that multiprocessing spawns begins with the file of `__main__`, and this one is light.
    exec(compile(code, first, "exec"), {"__name__": "__main__", "__file__": first})


if __name__ == "__main__":
    main()
