"""Copies of this rank's weights in host memory, and the model computing with one of them for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from miles.services.trainer.backends.megatron.model import MegatronModel


class WeightCopy:
    """The weights as they were at some time."""

    def __init__(self, model: MegatronModel) -> None:
        self._model = model
        self.tensors = {name: self._on_host(tensor) for name, tensor in model.parameters()}

    def take(self) -> None:
        """Copy the weights as they are now."""
        for name, tensor in self._model.parameters():
            self.tensors[name].copy_(tensor.detach(), non_blocking=True)
        self._wait()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the model compute with this copy; its own weights are back afterwards."""
        own = WeightCopy(self._model)
        try:
            self.put()
            yield
        finally:
            own.put()

    @torch.no_grad()
    def put(self) -> None:
        """Overwrite the model's weights."""
        for name, tensor in self._model.parameters():
            tensor.copy_(self.tensors[name], non_blocking=True)
        self._wait()

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return host.copy_(tensor.detach())

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
