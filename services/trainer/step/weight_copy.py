"""Copies of this rank's weights in host memory, which can be swapped into the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from miles.algorithms.token_sets import TokenSetScores
    from miles.services.trainer.batch.rollout_batch import RolloutBatch
    from miles.services.trainer.step.progress import Report
    from miles.services.trainer.step.token_sets import ScoreTokenSets, TokenSetRequest

Weights = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""Name and tensor of this rank's part of a model as it is now, in a fixed order."""
ComputeLogProbs = Callable[["RolloutBatch", "Report"], torch.Tensor]
"""As `LogProbRole.compute_log_probs`."""


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
    def swapped_in(self) -> Iterator[None]:
        """Have the model compute with this copy inside the block, and with its own weights again after it."""
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
    """Weights of the policy's shape; to query them, they are swapped into the policy's model temporarily."""

    def __init__(
        self, copy: WeightCopy, compute_log_probs: ComputeLogProbs, score_token_sets: ScoreTokenSets | None = None
    ) -> None:
        """Both run the policy's model with whatever weights it has; `score_token_sets` is a teacher's alone."""
        self.copy = copy
        self._compute_log_probs = compute_log_probs
        self._score_token_sets = score_token_sets

    def compute_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `LogProbRole.compute_log_probs`."""
        with self.copy.swapped_in():
            return self._compute_log_probs(batch, report)

    def score_token_sets(self, batch: RolloutBatch, request: TokenSetRequest, report: Report) -> TokenSetScores:
        """See `TokenSetRole.score_token_sets`."""
        if self._score_token_sets is None:
            raise RuntimeError("these weights were kept for the log-probabilities of sampled tokens alone")
        with self.copy.swapped_in():
            return self._score_token_sets(batch, request, report)

    def follow(self) -> None:
        """See `Reference.follow`."""
        self.copy.take()
