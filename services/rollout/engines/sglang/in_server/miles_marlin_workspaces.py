"""Keeps what captured CUDA graphs of INT4 experts use; called by servers, as their --custom-weight-loader.

Marlin's kernels count in a workspace, which is zero before and after each call. SGLang allocates a new one whenever it
has repacked a layer's experts (`compressed_tensors_wNa16_moe.py`), while graphs that it captured before go on using the
first one, whose memory would be free by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_FIRST = "miles_first_workspace"


def keep(model: torch.nn.Module, tensors: Sequence[Any]) -> None:
    """Hold on to the workspaces that graphs were captured with, and clear them; `tensors` is empty.

    To be called in each update session, before it ends. Memory that was released and restored holds anything.
    """
    for module in model.modules():
        workspace = getattr(module, "workspace", None)
        if isinstance(workspace, torch.Tensor):
            first = module.__dict__.setdefault(_FIRST, workspace)
            first.zero_()
