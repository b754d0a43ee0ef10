"""Reads the output of some modules of a model, by public hooks, in forward passes that ask for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Take = Callable[[int, torch.Tensor], None]
"""Called with a layer's number and its output, detached."""


class LayerReader:
    """Reads what is behind layers. Only inside `reading`: a recomputation in a backward pass is not read again."""

    def __init__(self, modules: Mapping[int, torch.nn.Module]) -> None:
        """`modules` by layer; each gives a tensor, or a tuple that begins with one."""
        self._take: Take | None = None
        self._layers = {id(module): layer for layer, module in modules.items()}
        # torch.compile runs it between the graphs before and behind, and sees none of it.
        hook = torch.compiler.disable(self._read)  # type: ignore[no-untyped-call]
        for module in modules.values():
            module.register_forward_hook(hook)

    @contextlib.contextmanager
    def reading(self, take: Take) -> Iterator[None]:
        """Hand on what layers give meanwhile."""
        self.begin(take)
        try:
            yield
        finally:
            self.end()

    def begin(self, take: Take) -> None:
        """Hand on what layers give until `end`."""
        self._take = take

    def end(self) -> None:
        """Hand on nothing."""
        self._take = None

    def _read(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._take is not None:
            tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
            self._take(self._layers[id(module)], tensor.detach())
