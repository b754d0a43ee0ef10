"""How busy the GPU was meanwhile, by the driver's own account: the share of time in which any kernel ran.

A witness that is no part of what is measured: a step may be full of activities while the GPU waits for the CPU. The
driver averages over a fraction of a second, so short runs have a blurred edge.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence

_EVERY_MS = 250


@contextlib.contextmanager
def watching(path: pathlib.Path, quantity: str = "utilization.gpu", gpu: str | None = None) -> Iterator[None]:
    """Write `unix seconds,value` into a file, line by line, as long as the block runs; without a driver nothing.

    `quantity` is nvidia-smi's: by default per cent of time; memory.used is in MiB. `gpu` is by default what
    CUDA_VISIBLE_DEVICES says.
    """
    if shutil.which("nvidia-smi") is None:
        yield
        return
    chosen = gpu or os.environ.get("CUDA_VISIBLE_DEVICES")
    command = [
        "nvidia-smi",
        *(["-i", chosen] if chosen else []),
        f"--query-gpu={quantity}",
        "--format=csv,noheader,nounits",
        f"-lms={_EVERY_MS}",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    thread = threading.Thread(target=_write, args=(process, path), daemon=True)
    thread.start()
    try:
        yield
    finally:
        process.kill()
        process.wait()
        thread.join()


def _write(process: subprocess.Popen[str], path: pathlib.Path) -> None:
    assert process.stdout is not None
    with path.open("w") as file:
        for line in process.stdout:
            if (value := line.strip()).isdigit():
                file.write(f"{time.time():.3f},{value}\n")


def busy_share(path: pathlib.Path, spans: Sequence[tuple[float, float]]) -> float | None:
    """Mean share within spans of unix time; None when nothing was read in them."""
    lines = path.read_text().splitlines() if path.exists() else []
    readings = [(float(when), float(value)) for when, _, value in (line.partition(",") for line in lines)]
    inside = [value for when, value in readings if any(start <= when <= end for start, end in spans)]
    return statistics.mean(inside) / 100 if inside else None
