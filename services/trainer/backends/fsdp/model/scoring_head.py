"""A vocabulary head that can give the scores of tokens in place of logits, which it then never holds in full.

Logits of 32k rows and 152k tokens are 10 GB in 16 bits, and as much is held of their gradient or computed over it. The
scores need one chunk of rows at a time, and the backward pass one block of the vocabulary, whose logits are computed
again (`miles.algorithms.linear_log_probs`). A row's log-probability comes from the same product as a logit.

Dims: U rows, M tokens scored at each, V vocabulary, D hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from miles.algorithms.linear_log_probs import linear_token_log_probs
from miles.algorithms.log_probs import CHUNK_ELEMENTS
from miles.algorithms.squared_probs import linear_sum_squared_probs
from miles.algorithms.token_sets import score_token_sets
from miles.algorithms.vocab_rows import TokenLogProbs, chunks, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from miles.services.trainer.backends.fsdp.model.likeliest import LikeliestOfRows

MAX_LOGIT_BYTES = 2 << 30
"""Logits of a micro-batch up to this size are computed in full: the backward pass then has no product to repeat."""

MIN_CHUNK = 16
"""Rows of a product of hidden states and head at least: fewer may be rounded differently."""

PLAIN_HEADS = frozenset(
    {
        *("llama", "mistral", "mixtral", "phi3", "smollm3", "olmo2", "olmoe"),
        *("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "glm4", "glm4_moe", "deepseek_v3"),
    }
)
"""Types of models that return what their head gives as it is; others scale or cap it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scoring:
    """What to score."""

    tokens_UM: torch.Tensor
    temperature: float
    with_entropy: bool
    entropy_requires_grad: bool
    chunk_rows: int | None
    with_squares: bool = False
    """Also give the sum of squared probabilities; without entropies."""


@dataclasses.dataclass(frozen=True, slots=True)
class SetScoring:
    """Several tokens of each row and its likeliest, without gradient."""

    tokens_UM: torch.Tensor | None
    top_k: int
    temperature: float
    chunk_rows: int | None

    def score(self, logits_UV: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """`TokenSetScores.joined` of these rows' logits; [U, M + 2 K]."""
        tokens_UM = None if self.tokens_UM is None else self.tokens_UM[rows]
        return score_token_sets(
            logits_UV, tokens_UM, self.top_k, temperature=self.temperature, chunk_rows=self.chunk_rows
        ).joined()

    def score_hidden(self, hidden_UD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """The same from hidden states, a chunk of rows at a time."""
        size = self.chunk_rows or max(MIN_CHUNK, rows_of(CHUNK_ELEMENTS, len(weight_VD), hidden_UD.device))
        parts = [
            self.score(torch.nn.functional.linear(hidden_UD[rows], weight_VD), rows)
            for rows in chunks(len(hidden_UD), size)
        ]
        return torch.cat(parts)


class ScoringHead(torch.nn.Linear):
    """A linear layer without bias."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        """Take over the weight, which other modules may share."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
        self.weight = weight
        self._scoring: Scoring | SetScoring | None = None
        self._likeliest: LikeliestOfRows | None = None

    @contextlib.contextmanager
    def scoring(self, scoring: Scoring | SetScoring, likeliest: LikeliestOfRows | None = None) -> Iterator[None]:
        """Have forward passes give scores meanwhile, see `read_scores`, and read the likeliest tokens of some rows."""
        self._scoring, self._likeliest = scoring, likeliest
        try:
            yield
        finally:
            self._scoring = self._likeliest = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [1, U, V] from hidden states [1, U, D]; or float32 [1, U, M], [1, U, M + 1] with one more column, or
        what `SetScoring` gives."""
        asked = self._scoring
        if asked is None:
            return super().forward(input)
        if self._likeliest is not None:
            self._likeliest.read_hidden(input[0], self.weight)
        if isinstance(asked, SetScoring):
            return asked.score_hidden(input[0], self.weight)[None]
        found = linear_token_log_probs(
            input[0],
            self.weight,
            asked.tokens_UM,
            temperature=asked.temperature,
            with_entropy=asked.with_entropy,
            entropy_requires_grad=asked.entropy_requires_grad,
            chunk_rows=asked.chunk_rows,
        )
        if asked.with_squares:
            squares_U = linear_sum_squared_probs(
                input[0], self.weight, temperature=asked.temperature, chunk_rows=asked.chunk_rows
            )
            return torch.cat([found.log_probs_T, squares_U[:, None]], dim=1)[None]
        if found.entropy_T is None:
            return found.log_probs_T[None]
        return torch.cat([found.log_probs_T, found.entropy_T[:, None]], dim=1)[None]


def read_scores(output_1UX: torch.Tensor, scoring: Scoring) -> TokenLogProbs:
    """Log-probabilities [U, M] and entropies [U] from what the head gave."""
    log_probs_UX = output_1UX[0]
    if not scoring.with_entropy:
        return TokenLogProbs(log_probs_UX, None)
    entropy_U = log_probs_UX[:, -1]
    return TokenLogProbs(log_probs_UX[:, :-1], entropy_U if scoring.entropy_requires_grad else entropy_U.detach())


def put_scoring_head(model: PreTrainedModel) -> None:
    """Give the model such a head where its own is a plain layer whose output nothing changes."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    is_plain = getattr(head, "bias", None) is None and type(head) is torch.nn.Linear
    if model.config.model_type in PLAIN_HEADS and is_plain:
        model.set_output_embeddings(ScoringHead(head.weight))  # type: ignore[no-untyped-call]


def scoring_head(model: torch.nn.Module, rows: int, compute: torch.dtype, limit_bytes: int) -> ScoringHead | None:
    """The model's head, if it can give scores and logits of so many rows, of this type, would exceed the limit."""
    head = getattr(model, "lm_head", None)
    if not isinstance(head, ScoringHead) or rows * head.out_features * compute.itemsize <= limit_bytes:
        return None
    return head
