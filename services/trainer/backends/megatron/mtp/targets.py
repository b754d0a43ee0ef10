"""What MTP layers read and predict: tokens further on in a row's own sample, from the micro-batch that every rank has.

Layer d (from 1) reads, at the row of token t, the embedding of token t + d, and predicts token t + d + 1. So no ranks
have to exchange tokens, however sequences are cut over them, and no row sees another sample's tokens.
Dims: T rows of the micro-batch, L local rows, S samples, R response tokens, P predictions of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from miles.services.trainer.backends.megatron.parallel.rows import PADDING, LocalRows
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan, RolloutBatch, response_mask


@dataclasses.dataclass(frozen=True, slots=True)
class TrainedTokens:
    """The response tokens of an optimizer step that enter the loss."""

    count: int
    """Of all ranks."""
    mask: Callable[[MicroBatch], npt.NDArray[np.bool_]]
    """Which of a micro-batch's response tokens they are; [R]."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerTokens:
    """What one MTP layer takes on a rank's rows."""

    input_ids_L: npt.NDArray[np.int64]
    """0 in padding, and where the sample has ended."""
    rows_P: npt.NDArray[np.int64]
    """Rows of L whose predictions are trained."""
    targets_P: npt.NDArray[np.int64]
    """The tokens that they predict."""


def trained_tokens(batch: RolloutBatch, step: OptimizerStepPlan) -> TrainedTokens:
    """Those of an optimizer step that the samples' loss masks leave."""

    def mask(micro_batch: MicroBatch) -> npt.NDArray[np.bool_]:
        masks = [response_mask(batch.samples[i]).astype(bool) & (i not in step.joined) for i in micro_batch.samples]
        return np.concatenate(masks) if masks else np.zeros(0, bool)

    return TrainedTokens(step.num_tokens, mask)


def layer_tokens(micro_batch: MicroBatch, rows: LocalRows, trained_R: npt.NDArray[np.bool_], layer: int) -> LayerTokens:
    """The tokens of MTP layer `layer` (from 1), for samples that do not share prompts."""
    tokens, trained, first_T, last_T = _tokens_of_samples(micro_batch, trained_R)
    present_L = rows.sources_L != PADDING
    first_L, last_L = first_T[rows.sources_L], last_T[rows.sources_L]
    read_L, predicted_L = first_L + layer, first_L + layer + 1
    reads_L = present_L & (read_L <= last_L)
    predicts_L = present_L & (predicted_L <= last_L)
    predicts_L &= trained[np.minimum(predicted_L, last_L)]
    rows_P = np.flatnonzero(predicts_L)
    return LayerTokens(
        input_ids_L=np.where(reads_L, tokens[np.minimum(read_L, last_L)], 0),
        rows_P=rows_P,
        targets_P=tokens[predicted_L[rows_P]],
    )


def _tokens_of_samples(
    micro_batch: MicroBatch, trained_R: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All tokens sample after sample, whether each is trained on, and for each row its token's and its sample's last.

    Rows are tokens without each sample's last one, which predicts nothing: token t of segment s is at row + s.
    """
    segments, starts = micro_batch.segments, micro_batch.cu_responses
    tokens = np.zeros(micro_batch.num_rows + len(segments), np.int64)
    trained = np.zeros(len(tokens), bool)
    first_T = np.arange(micro_batch.num_rows)
    last_T = np.zeros(micro_batch.num_rows, np.int64)
    for number, segment in enumerate(segments):
        last = segment.end + number
        tokens[segment.start + number : last] = micro_batch.input_ids_T[segment.start : segment.end]
        first_T[segment.start : segment.end] += number
        last_T[segment.start : segment.end] = last
        if number < len(micro_batch.samples):
            response = slice(starts[number], starts[number + 1])
            tokens[last] = micro_batch.targets_R[response][-1]
            trained[last + 1 - (response.stop - response.start) : last + 1] = trained_R[response]
    return tokens, trained, first_T, last_T
