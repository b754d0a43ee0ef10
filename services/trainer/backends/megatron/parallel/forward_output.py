"""What is read off the last stage's output for each response token, complete on every rank that has it.

Dims: R response tokens of a micro-batch, L local rows, V this rank's columns of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeVar

import torch

from miles.algorithms.log_probs import TokenLogProbs, VocabShard, token_log_probs
from miles.services.trainer.backends.megatron.parallel.groups import Place, SumOverRanks
from miles.services.trainer.backends.megatron.parallel.rows import LocalRows
from miles.services.trainer.batch.packing import MicroBatch

OutputT = TypeVar("OutputT")


@dataclasses.dataclass(frozen=True, slots=True)
class ReadingOptions:
    """How logits become log-probabilities."""

    temperature: float
    chunk_rows: int | None
    with_entropy: bool = False
    entropy_requires_grad: bool = False


class Reading(Protocol[OutputT]):
    """What a head's output says."""

    def outputs(self, output_1LV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> OutputT:
        """All that a loss needs."""

    def numbers(self, output_1LV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> torch.Tensor:
        """The one number that `Role.evaluate` gives; float32 [R]."""

    def nothing(self, outputs: OutputT) -> torch.Tensor:
        """A loss of 0 that hangs on the outputs, for a micro-batch without samples; 0-d."""


class LogProbs:
    """Log-probabilities, with entropies where the loss needs them."""

    def __init__(self, vocabulary: int, place: Place, options: ReadingOptions) -> None:
        """`vocabulary` counts tokens without padding."""
        self._place = place
        self._options = options
        columns = -(-vocabulary // place.tensor_size)
        first = place.tensor_rank * columns
        self._shard = VocabShard(place.tensor_group, start=first) if place.tensor_size > 1 else None
        self._columns = min(columns, vocabulary - first)

    def outputs(self, output_1LV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> TokenLogProbs:
        """See `Reading.outputs`."""
        return self._read(output_1LV, micro_batch, rows, self._options)

    def numbers(self, output_1LV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> torch.Tensor:
        """See `Reading.numbers`."""
        plain = dataclasses.replace(self._options, with_entropy=False, entropy_requires_grad=False)
        return self._read(output_1LV, micro_batch, rows, plain).log_probs_T

    def nothing(self, outputs: TokenLogProbs) -> torch.Tensor:
        """See `Reading.nothing`."""
        return outputs.log_probs_T.sum()

    def _read(
        self, logits_1LV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows, options: ReadingOptions
    ) -> TokenLogProbs:
        device = logits_1LV.device
        picked = logits_1LV[0].index_select(0, torch.from_numpy(rows.logit_rows).to(device))[:, : self._columns]
        targets_R = torch.from_numpy(micro_batch.targets_R).to(device)
        responses = torch.from_numpy(rows.responses).to(device)
        local = token_log_probs(
            picked,
            targets_R[responses],
            temperature=options.temperature,
            with_entropy=options.with_entropy,
            entropy_requires_grad=options.entropy_requires_grad,
            shard=self._shard,
            chunk_rows=options.chunk_rows,
            overwrite_logits=self._columns == logits_1LV.shape[-1],
        )
        log_probs_R = whole(local.log_probs_T, responses, len(targets_R), self._place)
        entropy = local.entropy_T
        return TokenLogProbs(
            log_probs_R, None if entropy is None else whole(entropy, responses, len(targets_R), self._place)
        )


class Values:
    """What a value head gives."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def outputs(self, output_1LV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> torch.Tensor:
        """See `Reading.outputs`; float32 [R]."""
        device = output_1LV.device
        values = output_1LV[0, :, 0].index_select(0, torch.from_numpy(rows.logit_rows).to(device))
        return whole(values, torch.from_numpy(rows.responses).to(device), len(micro_batch.targets_R), self._place)

    numbers = outputs

    def nothing(self, outputs: torch.Tensor) -> torch.Tensor:
        """See `Reading.nothing`."""
        return outputs.sum()


def whole(values: torch.Tensor, responses: torch.Tensor, count: int, place: Place) -> torch.Tensor:
    """Values of all R response tokens from those of this context-parallel rank; `responses` says which they are."""
    if place.context_size == 1:
        return values
    spread_R = values.new_zeros(count).index_put((responses,), values)
    summed: torch.Tensor = SumOverRanks.apply(spread_R, place.context_group)  # type: ignore[no-untyped-call]
    return summed
