"""Records the policy's forward passes of a Hugging Face model for the draft model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from miles.algorithms.device_copies import to_device
from miles.algorithms.token_sets import TokenSetScores
from miles.algorithms.vocab_rows import TokenLogProbs
from miles.drafts.recorded_layers import EMBEDDING
from miles.services.trainer.backends.fsdp.model.forward import LogProbForward
from miles.services.trainer.backends.fsdp.model.likeliest import Likeliest
from miles.services.trainer.backends.fsdp.model.sharded_model import decoder_layers
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.recording.layer_reader import LayerReader
from miles.services.trainer.recording.recorder import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RecordedForward:
    """The policy's forward pass, from which a recorder takes what it wants."""

    def __init__(self, recorder: Recorder, model: PreTrainedModel, forward: LogProbForward) -> None:
        """Put hooks on the layers that are recorded. Raises ValueError when the model does not have them."""
        self._recorder = recorder
        self._model = model
        self._forward = forward
        self._reader = LayerReader(_modules(model, recorder.options.layers))

    def for_loss(self, micro_batch: MicroBatch) -> TokenLogProbs:
        """See `ForwardPass.for_loss`."""
        recorder, device = self._recorder, self._forward.device
        rows = recorder.rows(micro_batch)
        if rows is None:
            return self._forward.for_loss(self._model, micro_batch)
        row_N = to_device(torch.from_numpy(rows.row_N), device)
        tokens_N = to_device(torch.from_numpy(micro_batch.input_ids_T[rows.row_N]), device)

        def keep_hidden(layer: int, hidden_1TD: torch.Tensor) -> None:
            with recorder.timed():
                hidden_ND = self._embedded(tokens_N) if layer == EMBEDDING else hidden_1TD[0].index_select(0, row_N)
                recorder.keep_hidden(micro_batch, torch.from_numpy(rows.rows_N2), layer, hidden_ND)

        def keep_top(scores: TokenSetScores) -> None:
            recorder.keep_top(micro_batch, torch.from_numpy(rows.top_rows_M2), scores)

        likeliest = Likeliest(rows.response_M, recorder.options.top_tokens, keep_top, recorder.timed)
        with self._reader.reading(keep_hidden):
            return self._forward.for_loss(self._model, micro_batch, likeliest)

    def _embedded(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """Rows of the table: some models scale what they read of it, and a draft does not."""
        table: Any = self._model.get_input_embeddings()
        return torch.nn.functional.embedding(tokens_N, table.weight.detach())


def _modules(model: PreTrainedModel, layers: tuple[int, ...]) -> dict[int, torch.nn.Module]:
    found: dict[int, Any] = dict(enumerate(decoder_layers(model)))
    found[EMBEDDING] = model.get_input_embeddings()
    if missing := [layer for layer in layers if layer not in found]:
        raise ValueError(f"{type(model).__name__} has no layers {missing}, which the draft model reads")
    return {layer: found[layer] for layer in layers}
