"""What was recorded of each micro-batch, in host memory, until it is written.

Dims: N rows and M response tokens of recorded samples on this rank, D hidden size, K likeliest tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from miles.algorithms.token_sets import TokenSetScores
from miles.drafts.recording_files import Part


@dataclasses.dataclass(slots=True)
class Piece:
    """What this rank has of one micro-batch; see `Part`."""

    rows_N2: torch.Tensor | None = None
    hidden_ND: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    top_rows_M2: torch.Tensor | None = None
    top_tokens_MK: torch.Tensor | None = None
    top_log_probs_MK: torch.Tensor | None = None

    def keep_hidden(self, rows_N2: torch.Tensor, layer: int, hidden_ND: torch.Tensor) -> None:
        """Keep what was read first: layers for multi-token prediction use the embeddings again."""
        self.rows_N2 = rows_N2
        if layer not in self.hidden_ND:
            self.hidden_ND[layer] = to_host(hidden_ND)

    def keep_top(self, rows_M2: torch.Tensor, scores: TokenSetScores) -> None:
        """Keep the likeliest tokens."""
        self.top_rows_M2 = rows_M2
        self.top_tokens_MK = to_host(scores.top_ids_TK.int())
        self.top_log_probs_MK = to_host(scores.top_log_probs_TK.float())


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; from a GPU it is there when the GPU has come to it, and the caller goes on at once."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def joined(pieces: Sequence[Piece]) -> Part | None:
    """The pieces as one part; None when there is nothing in them."""
    with_rows = [piece for piece in pieces if piece.rows_N2 is not None]
    with_top = [piece for piece in pieces if piece.top_rows_M2 is not None]
    if not with_rows and not with_top:
        return None
    layers = list(with_rows[0].hidden_ND) if with_rows else []

    return Part(
        rows_N2=_cat([piece.rows_N2 for piece in with_rows], torch.zeros(0, 2, dtype=torch.int32)),
        hidden_ND={layer: torch.cat([piece.hidden_ND[layer] for piece in with_rows]) for layer in layers},
        top_rows_M2=_cat([piece.top_rows_M2 for piece in with_top], torch.zeros(0, 2, dtype=torch.int32)),
        top_tokens_MK=_cat([piece.top_tokens_MK for piece in with_top], torch.zeros(0, 0, dtype=torch.int32)),
        top_log_probs_MK=_cat([piece.top_log_probs_MK for piece in with_top], torch.zeros(0, 0)),
    )


def _cat(parts: Sequence[torch.Tensor | None], nothing: torch.Tensor) -> torch.Tensor:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else nothing
