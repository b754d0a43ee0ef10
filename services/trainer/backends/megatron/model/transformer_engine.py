"""Whether a model's layers are TransformerEngine's, and which of its kernels they use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from miles.services.trainer.backends.megatron.model.engine_layers import ABSENT, why_no_engine
from miles.services.trainer.backends.megatron.precision.choice import low_precision

if TYPE_CHECKING:
    from miles.config import JobConfig

HOPPER = (9, 0)


def uses_transformer_engine(config: JobConfig) -> bool:
    """Whether layers are TransformerEngine's. Raises ValueError when it is asked for and cannot be used."""
    asked = config.megatron.transformer_impl
    if asked == "local":
        return False
    problem = why_no_engine(config) or _needs_local_layers(config)
    if problem is not None and asked == "transformer_engine":
        way_out = "install it, or set it to local" if problem == ABSENT else "set it to local"
        raise ValueError(f"transformer_impl = transformer_engine, but {problem}; {way_out}")
    return problem is None


def _needs_local_layers(config: JobConfig) -> str | None:
    low = low_precision(config)
    if low is None or not low.needs_local_layers:
        return None
    return f"{low.recipe.format} is emulated, which rounds the inputs of matrices, and its layers do not show them"


def choose_kernels() -> None:
    """Have TransformerEngine multiply a layer's experts in one kernel, on GPUs for which it has one.

    By default it launches a product for each expert on several streams, which took 2.5 times as long a step on an H200
    (benchmarks/results/h200.md). A user's own setting is kept.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER:
        os.environ.setdefault("NVTE_USE_CUTLASS_GROUPED_GEMM", "1")
