"""Facts that only PyTorch knows, asked in a process of its own: a broken driver may hang or kill it."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
import threading
from typing import Any

PROBE_S = 45.0
_PROGRAM = """
import json, torch
from miles.precision.speed import worker_speed
cuda = torch.cuda.is_available()
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "version": torch.__version__,
    "cuda_build": torch.version.cuda,
    "cuda_works": cuda,
    "built_for": torch.cuda.get_arch_list() if torch.version.cuda else [],
    "gpus": [{"name": g.name, "capability": [g.major, g.minor], "bytes": g.total_memory} for g in gpus],
    "speed": worker_speed("cpu"),
}))
"""


_once = threading.Lock()


def torch_facts() -> dict[str, Any] | None:
    """Return what PyTorch says of itself, the GPUs and this processor's speed; None when it is not installed.

    Raises subprocess.SubprocessError when it does not answer in time, or fails.
    """
    with _once:
        return _asked()


@functools.cache
def _asked() -> dict[str, Any] | None:
    if importlib.util.find_spec("torch") is None:
        return None
    command = [sys.executable, "-B", "-c", _PROGRAM]
    answered = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    if answered.returncode:
        last = (answered.stderr.strip().splitlines() or [f"exit code {answered.returncode}"])[-1]
        raise subprocess.SubprocessError(f"importing PyTorch failed: {last}")
    facts: dict[str, Any] = json.loads(answered.stdout.splitlines()[-1])
    return facts
