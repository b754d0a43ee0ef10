"""Whether a trainer's kernels give the same bits every time."""

from __future__ import annotations

import os

import torch

_OF_LIBRARIES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
"""Variables by which cuBLAS and TransformerEngine choose such kernels before their first one; a user's own are kept."""


def choose_determinism(device: torch.device, *, asked: bool) -> None:
    """Have PyTorch use deterministic kernels: always on a CPU, on a GPU when that is asked for.

    On a GPU PyTorch warns of an operation that has none, as some have not; on a CPU all have one.
    """
    # A debugging aid that comes with the switch below and costs a sixth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        return
    if asked:
        for name, value in _OF_LIBRARIES.items():
            os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(asked, warn_only=True)
