"""What a forward pass gives for each response token, from the last stage's output; complete on each of its ranks.

Dims: R response tokens of a micro-batch (in the head's output: those of this context-parallel rank), V this rank's
columns of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeVar

import torch

from miles.algorithms.device_copies import to_device
from miles.algorithms.log_probs import CHUNK_ELEMENTS, TokenLogProbs, VocabShard, token_log_probs
from miles.algorithms.squared_probs import sum_squared_probs
from miles.algorithms.token_sets import TokenSetScores, score_token_sets
from miles.algorithms.vocab_rows import chunks, rows_of
from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank, SumOverRanks
from miles.services.trainer.backends.megatron.parallel.rows import LocalRows
from miles.services.trainer.batch.packing import MicroBatch

OutputT = TypeVar("OutputT")


@dataclasses.dataclass(frozen=True, slots=True)
class LogProbOptions:
    """How logits become log-probabilities."""

    temperature: float
    chunk_rows: int | None
    with_entropy: bool = False
    entropy_requires_grad: bool = False


class ForwardOutput(Protocol[OutputT]):
    """The forward output for a micro-batch's response tokens, from the head's output on the rows that predict them."""

    def for_loss(self, output_1RV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> OutputT:
        """All that a loss needs."""

    def per_token(self, output_1RV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> torch.Tensor:
        """The log-probability or value of each response token alone; float32 [R]."""

    def zero_loss(self, outputs: OutputT) -> torch.Tensor:
        """A loss of 0 that depends on the outputs, for a micro-batch without samples; 0-d."""


class LogProbOutput:
    """Log-probabilities, with entropies where the loss needs them."""

    def __init__(self, vocabulary: int, parallel: ParallelRank, options: LogProbOptions) -> None:
        """`vocabulary` counts tokens without padding. Raises ValueError when a rank would have none of them."""
        self._parallel = parallel
        self._options = options
        columns = -(-vocabulary // parallel.tensor_size)
        if (parallel.tensor_size - 1) * columns >= vocabulary:
            raise ValueError(
                f"tensor_model_parallel_size = {parallel.tensor_size} leaves ranks without any of the model's "
                f"{vocabulary} tokens; lower it"
            )
        first = parallel.tensor_rank * columns
        self._shard = VocabShard(parallel.tensor_group, start=first) if parallel.tensor_size > 1 else None
        self._columns = min(columns, vocabulary - first)

    def for_loss(self, output_1RV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> TokenLogProbs:
        """See `ForwardOutput.for_loss`."""
        return self._log_probs(output_1RV, micro_batch, rows, self._options)

    def per_token(self, output_1RV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> torch.Tensor:
        """See `ForwardOutput.per_token`."""
        plain = dataclasses.replace(self._options, with_entropy=False, entropy_requires_grad=False)
        return self._log_probs(output_1RV, micro_batch, rows, plain).log_probs_T

    def with_squares(self, output_1RV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> torch.Tensor:
        """The log-probability of each response token, and the sum of squared probabilities there; float32 [R, 2]."""
        squares = sum_squared_probs(
            output_1RV[0, :, : self._columns],
            temperature=self._options.temperature,
            shard=self._shard,
            chunk_rows=self._options.chunk_rows,
        )
        responses = torch.from_numpy(rows.responses).to(squares.device)
        squares_R = all_responses(squares, responses, len(micro_batch.targets_R), self._parallel)
        return torch.stack([self.per_token(output_1RV, micro_batch, rows), squares_R], dim=1)

    def token_sets(
        self,
        output_1RV: torch.Tensor,
        micro_batch: MicroBatch,
        rows: LocalRows,
        tokens_RM: torch.Tensor | None,
        top_k: int,
    ) -> torch.Tensor:
        """`TokenSetScores.joined` of each response token; float32 [R, M + 2 K]."""
        responses = torch.from_numpy(rows.responses).to(output_1RV.device)
        scores = score_token_sets(
            output_1RV[0, :, : self._columns],
            None if tokens_RM is None else tokens_RM.to(output_1RV.device)[responses],
            top_k,
            temperature=self._options.temperature,
            shard=self._shard,
            chunk_rows=self._options.chunk_rows,
        )
        return all_responses(scores.joined().float(), responses, len(micro_batch.targets_R), self._parallel)

    @torch.no_grad()
    def likeliest(self, output_1RV: torch.Tensor, rows_M: torch.Tensor, top_k: int) -> TokenSetScores:
        """The likeliest tokens at some rows of the head's output, a chunk of rows at a time; without gradient."""
        rows_M = to_device(rows_M, output_1RV.device)
        size = self._options.chunk_rows or rows_of(CHUNK_ELEMENTS, output_1RV.shape[2], output_1RV.device)
        parts = [
            score_token_sets(
                output_1RV[0].index_select(0, rows_M[where])[:, : self._columns],
                None,
                top_k,
                temperature=self._options.temperature,
                shard=self._shard,
                chunk_rows=size,  # the same on ranks with fewer columns
            ).joined()
            for where in chunks(len(rows_M), size)
        ]
        return TokenSetScores.from_joined(torch.cat(parts) if parts else output_1RV.new_zeros(0, 2 * top_k), top_k)

    def zero_loss(self, outputs: TokenLogProbs) -> torch.Tensor:
        """See `ForwardOutput.zero_loss`."""
        return outputs.log_probs_T.sum()

    def _log_probs(
        self, logits_1RV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows, options: LogProbOptions
    ) -> TokenLogProbs:
        device = logits_1RV.device
        logits_RV = logits_1RV[0, :, : self._columns]
        targets_R = torch.from_numpy(micro_batch.targets_R).to(device)
        responses = torch.from_numpy(rows.responses).to(device)
        local = token_log_probs(
            logits_RV,
            targets_R[responses],
            temperature=options.temperature,
            with_entropy=options.with_entropy,
            entropy_requires_grad=options.entropy_requires_grad,
            shard=self._shard,
            chunk_rows=options.chunk_rows,
            overwrite_logits=True,
        )
        log_probs_R = all_responses(local.log_probs_T, responses, len(targets_R), self._parallel)
        entropy = local.entropy_T
        return TokenLogProbs(
            log_probs_R, None if entropy is None else all_responses(entropy, responses, len(targets_R), self._parallel)
        )


class ValueOutput:
    """Values, from a value head."""

    def __init__(self, parallel: ParallelRank) -> None:
        self._parallel = parallel

    def for_loss(self, output_1RV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> torch.Tensor:
        """See `ForwardOutput.for_loss`; float32 [R]."""
        responses = torch.from_numpy(rows.responses).to(output_1RV.device)
        return all_responses(output_1RV[0, :, 0], responses, len(micro_batch.targets_R), self._parallel)

    per_token = for_loss

    def zero_loss(self, outputs: torch.Tensor) -> torch.Tensor:
        """See `ForwardOutput.zero_loss`."""
        return outputs.sum()


def all_responses(values: torch.Tensor, responses: torch.Tensor, count: int, parallel: ParallelRank) -> torch.Tensor:
    """All R response tokens' values [R] or [R, X], from this context-parallel rank's, at the indices `responses`."""
    if parallel.context_size == 1:
        return values
    spread_R = values.new_zeros(count, *values.shape[1:]).index_put((responses,), values)
    summed: torch.Tensor = SumOverRanks.apply(spread_R, parallel.context_group)  # type: ignore[no-untyped-call]
    return summed
