"""What is asked of a model about several tokens at each response token's position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from miles.algorithms.token_sets import TokenSetScores

if TYPE_CHECKING:
    from miles.services.trainer.batch.rollout_batch import RolloutBatch
    from miles.services.trainer.step.progress import Report


@dataclasses.dataclass(frozen=True, slots=True)
class TokenSetRequest:
    """Tokens to score, and how many of the likeliest. T: this rank's response tokens, M: tokens given."""

    top_k: int = 0
    tokens_TM: torch.Tensor | None = None
    """int64; None for none. Ids outside the vocabulary have log-prob −inf."""

    @property
    def columns(self) -> int:
        """Numbers that answer it at each position; see `TokenSetScores.joined`."""
        return 2 * self.top_k + (0 if self.tokens_TM is None else self.tokens_TM.shape[1])

    def tokens_at(self, where_R: torch.Tensor) -> torch.Tensor | None:
        """The tokens [R, M] at some of the positions."""
        return None if self.tokens_TM is None else self.tokens_TM[where_R.to(self.tokens_TM.device)]


ScoreTokenSets = Callable[["RolloutBatch", TokenSetRequest, "Report"], TokenSetScores]
"""As `TokenSetRole.score_token_sets`."""
