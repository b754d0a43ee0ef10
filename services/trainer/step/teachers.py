"""Several teachers: each sample is scored by the one that its metadata names.

Dims: T response tokens of this rank's samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch

from miles.algorithms.token_sets import TokenSetScores
from miles.services.trainer.batch.rollout_batch import RolloutBatch
from miles.services.trainer.batch.rollout_schedule import is_trained
from miles.services.trainer.step.token_sets import TokenSetRequest

if TYPE_CHECKING:
    from miles.config.sections.distillation import DistillationConfig
    from miles.services.trainer.step.progress import Report
    from miles.services.trainer.step.roles import TokenSetRole

OutputT = TypeVar("OutputT")


class Teachers:
    """A role that asks several, one after the other; every rank makes the same calls.

    Micro-batches hold one teacher's samples each. Together they have as many tokens as one pass over the batch.
    """

    def __init__(self, roles: Mapping[str, TokenSetRole], config: DistillationConfig) -> None:
        self.roles = dict(roles)
        self._config = config

    def compute_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `LogProbRole.compute_log_probs`; 0 for samples that are not trained on."""
        parts = self._each(batch, lambda role, part: role.compute_log_probs(part, report))
        return torch.stack(parts).sum(dim=0)

    def score_token_sets(self, batch: RolloutBatch, request: TokenSetRequest, report: Report) -> TokenSetScores:
        """See `TokenSetRole.score_token_sets`; 0 likewise."""
        parts = self._each(batch, lambda role, part: role.score_token_sets(part, request, report).joined())
        return TokenSetScores.from_joined(torch.stack(parts).sum(dim=0), request.top_k)

    def _each(
        self, batch: RolloutBatch, ask: Callable[[TokenSetRole, RolloutBatch], torch.Tensor]
    ) -> list[torch.Tensor]:
        """Ask each teacher that has samples on any rank; positions of other samples are 0 in its answer."""
        teachers = [self._config.teacher_of(s.metadata) if is_trained(s) else None for s in batch.samples]
        used = [name for name in self.roles if name in teachers] or list(self.roles)[:1]
        return [
            ask(self.roles[name], batch.only([i for i, teacher in enumerate(teachers) if teacher == name]))
            for name in used
        ]
