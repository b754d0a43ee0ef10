"""Copies of this rank's weights in host memory, and the model computing with one of them for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from miles.services.trainer.batch.rollout_batch import RolloutBatch
    from miles.services.trainer.step.progress import Report

Weights = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""Name and tensor of this rank's part of a model as it is now, in a fixed order."""


class WeightCopy:
    """The weights as they were at some time."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.tensors = {name: self._on_host(tensor) for name, tensor in weights()}

    def take(self) -> None:
        """Copy the weights as they are now."""
        for name, tensor in self._weights():
            self.tensors[name].copy_(tensor.detach(), non_blocking=True)
        self._wait()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the model compute with this copy; its own weights are back afterwards."""
        own = WeightCopy(self._weights)
        try:
            self.put()
            yield
        finally:
            own.put()

    @torch.no_grad()
    def put(self) -> None:
        """Overwrite the model's weights."""
        for name, tensor in self._weights():
            tensor.copy_(self.tensors[name], non_blocking=True)
        self._wait()

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return host.copy_(tensor.detach())

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class CopiedRole:
    """Weights of the policy's shape that take its place while they are asked."""

    def __init__(self, copy: WeightCopy, evaluate: Callable[[RolloutBatch, Report], torch.Tensor]) -> None:
        """`evaluate` asks the policy's model, whatever its weights are."""
        self.copy = copy
        self._evaluate = evaluate

    def evaluate(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `Role.evaluate`."""
        with self.copy.in_place():
            return self._evaluate(batch, report)

    def follow(self) -> None:
        """See `Reference.follow`."""
        self.copy.take()
