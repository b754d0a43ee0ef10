"""The likeliest tokens at some response positions, from what a forward pass computes for its loss.

Dims: R response tokens of a micro-batch, M positions of them that are asked for, U rows of the head, V vocabulary, D
hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from miles.algorithms.device_copies import to_device
from miles.algorithms.log_probs import CHUNK_ELEMENTS
from miles.algorithms.token_sets import TokenSetScores
from miles.algorithms.vocab_rows import chunks, rows_of
from miles.services.trainer.backends.fsdp.model.scoring_head import MIN_CHUNK, SetScoring


@dataclasses.dataclass(frozen=True, slots=True)
class Likeliest:
    """What is asked for."""

    responses_M: npt.NDArray[np.int64]
    """Index in R of each position."""
    top_k: int
    take: Callable[[TokenSetScores], None]
    """Called with them during the forward pass; without gradient."""
    timed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """Surrounds what is computed for it."""

    def of_rows(self, row_R: npt.NDArray[np.int64], temperature: float, chunk_rows: int | None) -> LikeliestOfRows:
        """The same of rows of the head, of which `row_R` says which predicts each response token."""
        scoring = SetScoring(None, self.top_k, temperature, chunk_rows)
        return LikeliestOfRows(row_R[self.responses_M], scoring, self)


@dataclasses.dataclass(frozen=True, slots=True)
class LikeliestOfRows:
    """The likeliest tokens of some rows of the head."""

    rows_M: npt.NDArray[np.int64]
    scoring: SetScoring
    asked: Likeliest

    @torch.no_grad()
    def read_logits(self, logits_UV: torch.Tensor) -> None:
        """Read them off logits [U, V], a chunk of rows at a time."""
        with self.asked.timed():
            rows_M = to_device(torch.from_numpy(self.rows_M), logits_UV.device)
            size = self.scoring.chunk_rows or rows_of(CHUNK_ELEMENTS, logits_UV.shape[1], logits_UV.device)
            parts = [
                self.scoring.score(logits_UV.index_select(0, rows_M[where])) for where in chunks(len(rows_M), size)
            ]
            self._take(torch.cat(parts))

    @torch.no_grad()
    def read_hidden(self, hidden_UD: torch.Tensor, weight_VD: torch.Tensor) -> None:
        """Compute them from the hidden states of the rows and the head's weight; at least `MIN_CHUNK` rows."""
        with self.asked.timed():
            rows_M = np.pad(self.rows_M, (0, max(0, MIN_CHUNK - len(self.rows_M))), mode="edge")
            picked_MD = hidden_UD.index_select(0, to_device(torch.from_numpy(rows_M), hidden_UD.device))
            self._take(self.scoring.score_hidden(picked_MD, weight_VD)[: len(self.rows_M)])

    def _take(self, joined_MX: torch.Tensor) -> None:
        self.asked.take(TokenSetScores.from_joined(joined_MX, self.scoring.top_k))
