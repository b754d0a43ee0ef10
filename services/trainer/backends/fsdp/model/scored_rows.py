"""The rows that the head computes, each once, and which response tokens they predict.

Samples that share rows also share what predicts their tokens: the last row of a prompt predicts the first token of
every response to it.

Dims: R response tokens, U rows, M tokens of a row.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

MIN_ROWS = 16
"""A product of fewer rows may take another kernel, which rounds differently; the last row is repeated up to so many."""
MAX_TOKENS = 8
"""M at most; a row that predicts more tokens is there several times."""


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredRows:
    """Where each response token is predicted."""

    rows_U: npt.NDArray[np.int64]
    """Row of the micro-batch."""
    tokens_UM: npt.NDArray[np.int64]
    """Tokens that the row predicts; 0 where there are fewer than M."""
    row_R: npt.NDArray[np.int64]
    """For each response token its row in U,"""
    place_R: npt.NDArray[np.int64]
    """and its place in `tokens_UM.ravel()`."""


def scored_rows(logit_rows_R: npt.NDArray[np.int64], targets_R: npt.NDArray[np.int64]) -> ScoredRows:
    """From the row that predicts each response token, and the tokens."""
    order_R = np.argsort(logit_rows_R, kind="stable")
    sorted_R = logit_rows_R[order_R]
    number_R = np.arange(len(sorted_R)) - np.searchsorted(sorted_R, sorted_R)  # of the tokens of one row
    begins_R = number_R % MAX_TOKENS == 0
    row_R = np.cumsum(begins_R) - 1
    rows_U = sorted_R[begins_R]
    column_R = number_R % MAX_TOKENS
    tokens = int(column_R.max(initial=0)) + 1
    missing = max(0, MIN_ROWS - len(rows_U)) if len(rows_U) else 0
    tokens_UM = np.zeros((len(rows_U) + missing, tokens), np.int64)
    tokens_UM[row_R, column_R] = targets_R[order_R]
    back_R = np.argsort(order_R)
    return ScoredRows(
        rows_U=np.pad(rows_U, (0, missing), mode="edge") if missing else rows_U,
        tokens_UM=tokens_UM,
        row_R=row_R[back_R],
        place_R=(row_R * tokens + column_R)[back_R],
    )
