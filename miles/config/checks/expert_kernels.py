"""Checks whether this machine has the kernels by which the dispatcher flex sends tokens to experts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from miles.config.schema.faults import Fault, RunFault
from miles.config.schema.flat_settings import FlatSettings


def dispatcher_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield the fault of a dispatcher that needs a GPU or a package that is not installed."""
    if s.train_backend != "megatron" or s.moe_token_dispatcher_type != "flex":
        return
    if s.device == "cpu":
        problem = "its kernels need GPUs, and device is cpu"
    elif importlib.util.find_spec("deep_ep") is None:
        problem = "its kernels are of the package deep_ep, which is not installed"
    else:
        return
    remedy = "set it to alltoall, or install DeepEP (github.com/deepseek-ai/DeepEP) where the trainer runs"
    yield RunFault("moe_token_dispatcher_type", "flex", problem, remedy)
