"""Training passes of MTP layers: their forward pass behind the model's, their loss and its metrics.

A layer's loss is the cross-entropy of the trained response tokens that it predicts. They are summed, divided by the
trained tokens of the whole optimizer step and by the layers, so gradients are the same in every layout. Only MTP layers
get a gradient: hidden states, embeddings and the output matrix are detached.
Dims: L local rows, P predictions of a layer, V columns of the head on this rank.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from miles.algorithms.log_probs import VocabShard, token_log_probs
from miles.services.trainer.backends.megatron.mtp.embeddings import borrow_embeddings, look_up
from miles.services.trainer.backends.megatron.mtp.targets import LayerTokens, TrainedTokens, layer_tokens
from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank
from miles.services.trainer.backends.megatron.parallel.response_head import response_logits
from miles.services.trainer.backends.megatron.parallel.rows import LocalRows
from miles.services.trainer.batch.packing import MicroBatch

Head = Callable[..., torch.Tensor]
"""Megatron-Core's `output_processor`."""


class MtpTraining:
    """Runs the MTP layers in the passes that train them."""

    def __init__(
        self,
        chunks: list[Any],
        vocabulary: int,
        parallel: ParallelRank,
        device: torch.device,
        *,
        weight: float,
        chunk_rows: int | None,
    ) -> None:
        """`chunks` are this rank's; `vocabulary` counts tokens without padding; `weight` is that of the loss."""
        from megatron.core.utils import unwrap_model

        self._chunks = chunks
        self._last: Any = next((c for c in unwrap_model(chunks) if getattr(c, "mtp", None) is not None), None)
        self._parallel = parallel
        self._device = device
        self._weight = weight
        self._chunk_rows = chunk_rows
        columns = -(-vocabulary // parallel.tensor_size)
        self._first_column = columns * parallel.tensor_rank
        self._columns = min(columns, vocabulary - self._first_column)
        self._shard = VocabShard(parallel.tensor_group, start=self._first_column) if parallel.tensor_size > 1 else None
        self._sums: torch.Tensor | None = None
        """By layer: loss, predictions that were right, predictions; float64."""
        self._trained: TrainedTokens | None = None
        self._embeddings_VH: torch.Tensor | None = None
        self._rotary: dict[str, Any] = {}

    @contextlib.contextmanager
    def enabled(self, trained: TrainedTokens) -> Iterator[None]:
        """Enable `head` inside the block, for an optimizer step that trains on these tokens; collective."""
        self._trained = trained
        self._embeddings_VH = borrow_embeddings(self._chunks, self._parallel)
        handle = None
        if self._last is not None:
            handle = self._last.decoder.register_forward_pre_hook(self._keep_rotary, with_kwargs=True)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
            self._trained, self._embeddings_VH, self._rotary = None, None, {}

    def head(self, chunk: Any, micro_batch: MicroBatch, rows: LocalRows, losses: list[torch.Tensor]) -> Head:
        """The head for a forward pass of a chunk; behind the last one it appends the MTP layers' loss to `losses`."""
        from megatron.core.utils import unwrap_model

        if unwrap_model(chunk) is not self._last:
            return response_logits

        def with_loss(**given: Any) -> torch.Tensor:
            losses.append(self._loss(micro_batch, rows, given))
            return response_logits(**given)

        return with_loss

    def take_metrics(self) -> dict[str, float]:
        """The mean loss and the share of right predictions since the last call; collective, nothing before the last
        stage."""
        from megatron.core import parallel_state

        if self._last is None:
            return {}
        sums = self._zeros() if self._sums is None else self._sums
        self._sums = None
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        by_layer = sums.tolist()
        count = max(sum(each[2] for each in by_layer), 1.0)
        metrics = {"train/mtp_loss": sum(each[0] for each in by_layer) / count}
        for number, (_, right, predicted) in enumerate(by_layer):
            metrics["train/mtp_acceptance" + (f"_{number + 1}" if number else "")] = right / max(predicted, 1.0)
        return metrics

    def _keep_rotary(self, module: Any, args: Any, given: dict[str, Any]) -> None:
        self._rotary = {name: value for name, value in given.items() if name.startswith("rotary_")}
        self._rotary.pop("rotary_pos_cos_sin", None)  # of inference alone

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(len(self._last.mtp.layers), 3, dtype=torch.float64, device=self._device)

    def _loss(self, micro_batch: MicroBatch, rows: LocalRows, given: dict[str, Any]) -> torch.Tensor:
        """The weighted loss of all layers; 0-d."""
        assert self._trained is not None, "MTP layers run inside `enabled` alone"
        trained_R = self._trained.mask(micro_batch)
        head = functools.partial(response_logits, **self._detached(given))
        hidden = given["hidden_states"].detach()
        layers = self._last.mtp.layers
        total = torch.zeros((), device=self._device)
        for number, layer in enumerate(layers):
            tokens = layer_tokens(micro_batch, rows, trained_R, number + 1)
            hidden = self._forward(layer, hidden, self._embedded(tokens, rows), given)
            total = total - self._log_likelihood(head, hidden, tokens, number)
        return total * (self._weight / (len(layers) * max(self._trained.count, 1)))

    def _detached(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the head takes, with a matrix that gets no gradient."""
        weight = given["output_weight"]
        output_layer = given["output_layer"]
        weight = (output_layer.weight if weight is None else weight).detach()
        return {"output_layer": output_layer, "output_weight": weight, "scale_logits": given["scale_logits"]}

    def _embedded(self, tokens: LayerTokens, rows: LocalRows) -> torch.Tensor:
        assert self._embeddings_VH is not None, "the last stage has borrowed them"
        ids_SM = torch.from_numpy(rows.by_sample(tokens.input_ids_L)).to(self._device)
        sequence_parallel = self._last.config.sequence_parallel
        return look_up(self._embeddings_VH, ids_SM, self._parallel, sequence_parallel=sequence_parallel)

    def _forward(self, layer: Any, hidden: torch.Tensor, embedded: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        """A layer's output. Without token ids Megatron-Core shifts nothing, and takes the embeddings as they are."""
        output: torch.Tensor = layer(
            input_ids=None,
            position_ids=None,
            hidden_states=hidden,
            attention_mask=given["attention_mask"],
            packed_seq_params=given["packed_seq_params"],
            embedding=lambda **_: embedded,
            **self._rotary,
        )[0]
        return output

    def _log_likelihood(self, head: Head, hidden: torch.Tensor, tokens: LayerTokens, number: int) -> torch.Tensor:
        """Sum of the log-probabilities of the predicted tokens; 0-d. Counts them, and which were the likeliest."""
        rows_P = torch.from_numpy(tokens.rows_P).to(self._device)
        targets_P = torch.from_numpy(tokens.targets_P).to(self._device)
        logits_PV = head(hidden_states=hidden, context=rows_P)[0, :, : self._columns]
        right = (self._likeliest(logits_PV.detach()) == targets_P).sum()
        log_probs_P = token_log_probs(
            logits_PV, targets_P, shard=self._shard, chunk_rows=self._chunk_rows, overwrite_logits=True
        ).log_probs_T
        if self._sums is None:
            self._sums = self._zeros()
        self._sums[number, 0] -= log_probs_P.detach().sum()
        self._sums[number, 1] += right
        self._sums[number, 2] += len(rows_P)
        return log_probs_P.sum()

    def _likeliest(self, logits_PV: torch.Tensor) -> torch.Tensor:
        """The likeliest token of each row over all ranks' columns, the first of equal ones; int64 [P]."""
        best_P, column_P = logits_PV.max(dim=1)
        token_P = column_P + self._first_column
        if self._shard is None:
            return token_P
        highest_P = best_P.clone()
        dist.all_reduce(highest_P, dist.ReduceOp.MAX, group=self._shard.group)
        token_P = torch.where(best_P == highest_P, token_P, torch.iinfo(torch.int64).max)
        dist.all_reduce(token_P, dist.ReduceOp.MIN, group=self._shard.group)
        return token_P
