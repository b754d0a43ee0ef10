"""Functions that servers of quantised weights call in an update session, as their --custom-weight-loader.

Imports nothing of the package, which servers' environments lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_FIRST = "miles_first_workspace"


def keep_workspaces(model: torch.nn.Module, tensors: Sequence[Any]) -> None:
    """Keep what CUDA graphs of INT4 experts use apart from weights, and clear it; `tensors` is empty.

    Marlin's kernels count in a workspace, which is zero before and after each call. SGLang allocates a new one whenever
    it has repacked a layer's experts (`compressed_tensors_wNa16_moe.py`), while graphs that it captured before go on
    using the first one, whose memory would be free by then. Memory that was released and restored holds anything.
    """
    for module in model.modules():
        workspace = getattr(module, "workspace", None)
        if isinstance(workspace, torch.Tensor):
            first = module.__dict__.setdefault(_FIRST, workspace)
            first.zero_()


def drain(model: torch.nn.Module, tensors: Sequence[Any]) -> None:
    """Wait until the GPU has finished all its work; `tensors` is empty."""
    torch.cuda.synchronize()
