"""A list of micro-batches through this rank's part of the model, by Megatron-Core's pipeline schedules.

Dims: R response tokens of a micro-batch, L local rows, V this rank's columns of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from miles.algorithms.log_probs import TokenLogProbs, VocabShard, token_log_probs
from miles.services.trainer.backends.megatron.groups import Place, SumOverRanks
from miles.services.trainer.backends.megatron.model import MegatronModel
from miles.services.trainer.backends.megatron.rows import LocalRows, local_rows
from miles.services.trainer.packing import EMPTY, MicroBatch

Loss = Callable[[int, TokenLogProbs], tuple[torch.Tensor, Any]]
"""From the number of a micro-batch and its log-probabilities: the loss, and what to hand back."""
Before = Callable[[int, int, LocalRows], None]
"""Called with chunk, number of the micro-batch and its rows, before the chunk's forward pass."""
After = Callable[[int, int], None]
"""Called with chunk and number after it."""


@dataclasses.dataclass(frozen=True, slots=True)
class PassOptions:
    """How logits become log-probabilities."""

    device: torch.device
    temperature: float
    chunk_rows: int | None
    with_entropy: bool = False
    entropy_requires_grad: bool = False


class Pipeline:
    """Runs forward passes, and backward passes where there is a gradient."""

    def __init__(self, model: MegatronModel, place: Place) -> None:
        self._model = model
        self._place = place
        self._chunk_of = {id(chunk): index for index, chunk in enumerate(model.chunks)}
        self._shard = None
        if place.tensor_size > 1:
            columns = -(-model.vocabulary // place.tensor_size)
            self._shard = VocabShard(place.tensor_group, start=place.tensor_rank * columns)
        self._columns = min(-(-model.vocabulary // place.tensor_size), model.vocabulary)

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Loss,
        options: PassOptions,
        *,
        with_gradient: bool,
        before: Before | None = None,
        after: After | None = None,
    ) -> list[Any]:
        """What `loss` handed back for each micro-batch on the last stage, an empty list on others; collective.

        With a gradient it is added to the parameters' `main_grad`, summed over micro-batches and all ranks.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        padded = self._filled_up(micro_batches)
        rows = [self._local_rows(micro_batch) for micro_batch in padded]

        def forward_step(numbers: Iterator[int], chunk: Any) -> tuple[torch.Tensor, Any]:
            number, index = next(numbers), self._chunk_of[id(chunk)]
            if before is not None:
                before(index, number, rows[number])
            output = self._forward(chunk, rows[number], options.device)
            if after is not None:
                after(index, number)

            def finish(logits_1LV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
                outputs = self._log_probs(logits_1LV, padded[number], rows[number], options)
                value, data = loss(number, outputs)
                return value, torch.ones((), dtype=torch.int, device=options.device), (number, data)

            return output, finish

        schedule = get_forward_backward_func()
        numbers = [iter(range(len(padded))) for _ in self._model.chunks]
        collected: list[tuple[int, Any]] = schedule(
            forward_step_func=forward_step,
            data_iterator=numbers if len(numbers) > 1 else numbers[0],
            model=self._model.chunks if len(numbers) > 1 else self._model.chunks[0],
            num_microbatches=len(padded),
            seq_length=max(len(r.input_ids_L) for r in rows),
            micro_batch_size=1,
            forward_only=not with_gradient,
        )
        return [data for number, data in sorted(collected, key=lambda item: item[0]) if number < len(micro_batches)]

    def _filled_up(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The interleaved schedule takes a multiple of the stages."""
        stages = self._place.pipeline_size if len(self._model.chunks) > 1 else 1
        return [*micro_batches, *[EMPTY] * (-len(micro_batches) % stages)]

    def _local_rows(self, micro_batch: MicroBatch) -> LocalRows:
        place = self._place
        multiple = place.tensor_size if self._model.config.sequence_parallel else 1
        return local_rows(
            micro_batch, context_rank=place.context_rank, context_size=place.context_size, multiple_of=multiple
        )

    def _forward(self, chunk: Any, rows: LocalRows, device: torch.device) -> torch.Tensor:
        """Logits [1, L, V] on the last stage, else what the next stage takes."""
        from megatron.core.packed_seq_params import PackedSeqParams

        starts = torch.from_numpy(rows.cu_seqlens).to(device)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            cu_seqlens_q_padded=starts,
            cu_seqlens_kv_padded=starts,
            max_seqlen_q=rows.max_seqlen,
            max_seqlen_kv=rows.max_seqlen,
        )
        output: torch.Tensor = chunk(
            input_ids=torch.from_numpy(rows.input_ids_L)[None].to(device),
            position_ids=torch.from_numpy(rows.position_ids_L)[None].to(device),
            attention_mask=None,
            packed_seq_params=packed,
            **({"fp32_output": False} if self._model.config.bf16 or self._model.config.fp16 else {}),
        )
        return output

    def _log_probs(
        self, logits_1LV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows, options: PassOptions
    ) -> TokenLogProbs:
        """Of all R response tokens, on every rank that has logits."""
        device = options.device
        columns = self._columns
        if self._shard is not None and self._shard.start is not None:
            columns = min(columns, self._model.vocabulary - self._shard.start)
        picked = logits_1LV[0].index_select(0, torch.from_numpy(rows.logit_rows).to(device))[:, :columns]
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
            overwrite_logits=columns == logits_1LV.shape[-1],
        )
        if self._place.context_size == 1:
            return local
        whole = [self._whole(x, responses, len(targets_R)) for x in (local.log_probs_T, local.entropy_T)]
        assert whole[0] is not None
        return TokenLogProbs(whole[0], whole[1])

    def _whole(self, values: torch.Tensor | None, responses: torch.Tensor, count: int) -> torch.Tensor | None:
        """Values of all response tokens from those of this context-parallel rank."""
        if values is None:
            return None
        spread_R = values.new_zeros(count).index_put((responses,), values)
        whole: torch.Tensor = SumOverRanks.apply(spread_R, self._place.context_group)  # type: ignore[no-untyped-call]
        return whole
