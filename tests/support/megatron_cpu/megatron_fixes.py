"""Fixes of megatron-core 0.19.2 where it assumes a GPU. For tests alone."""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Put the fixes in place; needs `cuda_stand_ins`."""
    _expert_splits()
    _classes_of_layers()


def _classes_of_layers() -> None:
    """megatron-bridge asks whether a layer is one of TransformerEngine's, which are no classes here."""
    import megatron.core.extensions.transformer_engine as extension

    for name, value in vars(extension).copy().items():
        if name.startswith("TE") and not isinstance(value, type):
            setattr(extension, name, type(name, (), {}))


def _expert_splits() -> None:
    """The splits of an all-to-all must be numbers; the original converts them only when they are on a GPU."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def to_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = to_numbers
