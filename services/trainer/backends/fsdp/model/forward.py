"""One micro-batch through a model. Dims: T rows, R response tokens, U rows that predict them, V vocabulary."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from miles.algorithms.device_copies import to_device
from miles.algorithms.log_probs import TokenLogProbs, token_log_probs
from miles.algorithms.squared_probs import sum_squared_probs
from miles.algorithms.token_sets import TokenSetScores
from miles.services.trainer.backends.fsdp.attention.packed_attention import AttentionPlan
from miles.services.trainer.backends.fsdp.model.likeliest import Likeliest
from miles.services.trainer.backends.fsdp.model.scored_rows import MIN_ROWS, scored_rows
from miles.services.trainer.backends.fsdp.model.scoring_head import (
    MAX_LOGIT_BYTES,
    Scoring,
    SetScoring,
    read_scores,
    scoring_head,
)
from miles.services.trainer.batch.packing import MicroBatch


@dataclasses.dataclass(frozen=True, slots=True)
class ForwardOptions:
    """How to run a model."""

    device: torch.device
    compute: torch.dtype
    temperature: float
    """Divides the logits, as it did when the tokens were sampled."""
    chunk_rows: int | None = None
    """Rows of logits worked on in float32 at a time; None for as many as `CHUNK_ELEMENTS` says."""
    varlen: bool | None = None
    """Whether to use variable-length kernels; None where they run."""
    logit_bytes: int = MAX_LOGIT_BYTES
    """Size of logits above which they are never held in full, by models that allow it."""


class LogProbForward:
    """Log-probabilities, with entropies where the loss needs them."""

    def __init__(self, options: ForwardOptions, *, with_entropy: bool = False, entropy_requires_grad: bool = False):
        self.device = options.device
        self._options = options
        self._entropy = {"with_entropy": with_entropy, "entropy_requires_grad": entropy_requires_grad}

    def for_loss(
        self, model: torch.nn.Module, micro_batch: MicroBatch, likeliest: Likeliest | None = None
    ) -> TokenLogProbs:
        """See `ForwardPass.for_loss`; gives the likeliest tokens of some positions too."""
        return forward(model, micro_batch, self._options, **self._entropy, likeliest=likeliest)

    def per_token(self, model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """See `ForwardPass.per_token`."""
        return forward(model, micro_batch, self._options).log_probs_T

    def with_squares(self, model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """The log-probability of each response token, and the sum of squared probabilities there; float32 [R, 2]."""
        return log_probs_and_squares(model, micro_batch, self._options)

    def token_sets(
        self, model: torch.nn.Module, micro_batch: MicroBatch, tokens_RM: torch.Tensor | None, top_k: int
    ) -> TokenSetScores:
        """Scores of tokens where each response token is predicted, and of the likeliest; without gradient."""
        return score_sets(model, micro_batch, self._options, tokens_RM, top_k)


class ValueForward:
    """Values: the one column of logits of a model with a value head."""

    def __init__(self, options: ForwardOptions) -> None:
        self.device = options.device
        self._options = options

    def for_loss(self, model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """See `ForwardPass.for_loss`; float32 [R]."""
        return _head_output(model, micro_batch, self._options, micro_batch.logit_rows_R)[0, :, 0]

    per_token = for_loss


def forward(
    model: torch.nn.Module,
    micro_batch: MicroBatch,
    options: ForwardOptions,
    *,
    with_entropy: bool = False,
    entropy_requires_grad: bool = False,
    likeliest: Likeliest | None = None,
) -> TokenLogProbs:
    """Log-probabilities [R] of the micro-batch's response tokens; the head runs once on each row that predicts any."""
    scored = scored_rows(micro_batch.logit_rows_R, micro_batch.targets_R)
    tokens_UM = to_device(torch.from_numpy(scored.tokens_UM), options.device)
    scoring = Scoring(tokens_UM, options.temperature, with_entropy, entropy_requires_grad, options.chunk_rows)
    asked = None if likeliest is None else likeliest.of_rows(scored.row_R, options.temperature, options.chunk_rows)
    head = scoring_head(model, len(scored.rows_U), options.compute, options.logit_bytes)
    if head is not None:
        with head.scoring(scoring, asked):
            outputs = read_scores(_head_output(model, micro_batch, options, scored.rows_U), scoring)
    else:
        logits_UV = _head_output(model, micro_batch, options, scored.rows_U)[0]
        if asked is not None:
            asked.read_logits(logits_UV)
        outputs = token_log_probs(
            logits_UV,
            tokens_UM,
            temperature=options.temperature,
            with_entropy=with_entropy,
            entropy_requires_grad=entropy_requires_grad,
            chunk_rows=options.chunk_rows,
            overwrite_logits=True,
        )
    places_R = to_device(torch.from_numpy(scored.place_R), options.device)
    log_probs_R = outputs.log_probs_T.flatten().index_select(0, places_R)  # all different, so its gradient repeats
    if outputs.entropy_T is None:
        return TokenLogProbs(log_probs_R, None)
    return TokenLogProbs(log_probs_R, outputs.entropy_T[to_device(torch.from_numpy(scored.row_R), options.device)])


def log_probs_and_squares(model: torch.nn.Module, micro_batch: MicroBatch, options: ForwardOptions) -> torch.Tensor:
    """Log-probabilities and sums of squared probabilities of the micro-batch's response tokens; float32 [R, 2]."""
    scored = scored_rows(micro_batch.logit_rows_R, micro_batch.targets_R)
    tokens_UM = to_device(torch.from_numpy(scored.tokens_UM), options.device)
    head = scoring_head(model, len(scored.rows_U), options.compute, options.logit_bytes)
    if head is not None:
        with head.scoring(Scoring(tokens_UM, options.temperature, False, False, options.chunk_rows, with_squares=True)):
            output_UX = _head_output(model, micro_batch, options, scored.rows_U)[0]
        log_probs_UM, squares_U = output_UX[:, :-1], output_UX[:, -1]
    else:
        logits_UV = _head_output(model, micro_batch, options, scored.rows_U)[0]
        log_probs_UM = token_log_probs(
            logits_UV, tokens_UM, temperature=options.temperature, chunk_rows=options.chunk_rows
        ).log_probs_T
        squares_U = sum_squared_probs(logits_UV, temperature=options.temperature, chunk_rows=options.chunk_rows)
    places_R, rows_R = (to_device(torch.from_numpy(x), options.device) for x in (scored.place_R, scored.row_R))
    return torch.stack([log_probs_UM.flatten()[places_R], squares_U[rows_R]], dim=1)


def score_sets(
    model: torch.nn.Module,
    micro_batch: MicroBatch,
    options: ForwardOptions,
    tokens_RM: torch.Tensor | None,
    top_k: int,
) -> TokenSetScores:
    """Score sets of tokens [R, M] of the micro-batch; the head runs on each row that predicts one."""
    rows_U, count = micro_batch.logit_rows_R, len(micro_batch.logit_rows_R)
    if 0 < count < MIN_ROWS:
        rows_U = np.pad(rows_U, (0, MIN_ROWS - count), mode="edge")
        if tokens_RM is not None:
            tokens_RM = torch.cat([tokens_RM, tokens_RM[-1:].expand(MIN_ROWS - count, -1)])
    tokens_UM = None if tokens_RM is None else to_device(tokens_RM, options.device)
    scoring = SetScoring(tokens_UM, top_k, options.temperature, options.chunk_rows)
    head = scoring_head(model, len(rows_U), options.compute, options.logit_bytes)
    if head is None:
        joined_UX = scoring.score(_head_output(model, micro_batch, options, rows_U)[0])
    else:
        with head.scoring(scoring):
            joined_UX = _head_output(model, micro_batch, options, rows_U)[0]
    return TokenSetScores.from_joined(joined_UX[:count], top_k)


def _head_output(
    model: torch.nn.Module, micro_batch: MicroBatch, options: ForwardOptions, rows_U: npt.NDArray[np.int64]
) -> torch.Tensor:
    """The head's output on these rows; [1, U, V], or what `ScoringHead` gives."""
    device = options.device
    output_1UV: torch.Tensor = model(
        input_ids=to_device(torch.from_numpy(micro_batch.input_ids_T)[None], device),
        position_ids=to_device(torch.from_numpy(micro_batch.position_ids_T)[None], device),
        logits_to_keep=to_device(torch.from_numpy(rows_U), device),
        attention_plan=AttentionPlan(micro_batch.segments, device, options.compute, varlen=options.varlen),
        use_cache=False,
    ).logits
    return output_1UV
