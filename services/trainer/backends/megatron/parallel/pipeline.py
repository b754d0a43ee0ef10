"""A list of micro-batches through this rank's part of the model, by Megatron-Core's pipeline schedules.

Dims: L local rows, R those of them that predict response tokens, V columns of the head on this rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy.typing as npt
import torch
import torch.distributed as dist

from miles.services.trainer.backends.megatron.model.build_model import MegatronModel
from miles.services.trainer.backends.megatron.mtp.targets import TrainedTokens
from miles.services.trainer.backends.megatron.mtp.training import Head, MtpTraining
from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank
from miles.services.trainer.backends.megatron.parallel.response_head import response_logits
from miles.services.trainer.backends.megatron.parallel.rows import LocalRows, local_rows, padded_rows
from miles.services.trainer.backends.megatron.precision import kernels
from miles.services.trainer.backends.megatron.precision.rounding import rounded_once
from miles.services.trainer.batch.packing import EMPTY, MicroBatch

OutputT = TypeVar("OutputT")
Read = Callable[[torch.Tensor, MicroBatch, LocalRows], OutputT]
"""From the head's output [1, R, V] to the forward output for a micro-batch's response tokens."""
Before = Callable[[int, int, LocalRows], None]
"""Called with chunk, number of the micro-batch and its rows, before the chunk's forward pass."""
After = Callable[[int, int], None]
"""Called with chunk and number after it."""


class Pipeline:
    """Runs forward passes, and backward passes where there is a gradient."""

    def __init__(
        self,
        model: MegatronModel,
        parallel: ParallelRank,
        device: torch.device,
        mtp: MtpTraining | None = None,
        *,
        padded: bool = False,
    ) -> None:
        """`mtp` trains MTP layers, in passes that ask for it. `padded` lays samples side by side instead of packing."""
        self._model = model
        self._padded = padded
        self._mtp = mtp
        self._parallel = parallel
        self._device = device
        self._rounding = [
            module for chunk in model.bare_chunks for module in chunk.modules() if hasattr(module, "roundings")
        ]
        self._chunk_of = {id(chunk): index for index, chunk in enumerate(model.chunks)}

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        read: Read[OutputT],
        loss: Callable[[int, OutputT], tuple[torch.Tensor, Any]],
        *,
        with_gradient: bool,
        before: Before | None = None,
        after: After | None = None,
        trained: TrainedTokens | None = None,
    ) -> list[Any]:
        """Return the data that `loss` gave for each micro-batch; an empty list before the last stage; collective.

        `loss` takes the number of a micro-batch and its forward output, and gives the loss and any data to return.
        Numbers beyond the micro-batches belong to empty ones that fill up the schedule. With a gradient, it is added to
        the parameters' `main_grad`, summed over micro-batches and all ranks. With the tokens that the optimizer step
        trains on, MTP layers are trained too where the configuration asks for it.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        mtp = None if trained is None else self._mtp
        padded = self._filled_up(micro_batches)
        rows = [self._local_rows(micro_batch) for micro_batch in padded]

        def forward_step(numbers: Iterator[int], chunk: Any) -> tuple[torch.Tensor, Any]:
            number, index = next(numbers), self._chunk_of[id(chunk)]
            if before is not None:
                before(index, number, rows[number])
            mtp_losses: list[torch.Tensor] = []
            head = response_logits if mtp is None else mtp.head(chunk, padded[number], rows[number], mtp_losses)
            output = self._forward(chunk, rows[number], head)
            if after is not None:
                after(index, number)

            def finish(output_1RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
                value, data = loss(number, read(output_1RV, padded[number], rows[number]))
                value = sum(mtp_losses, start=value)
                return value, torch.ones((), dtype=torch.int, device=self._device), (number, data)

            return output, finish

        if with_gradient and (self._model.config.moe_aux_loss_coeff or self._model.config.moe_z_loss_coeff):
            self._average_router_losses(rows)
        schedule = get_forward_backward_func()
        numbers = [iter(range(len(padded))) for _ in self._model.chunks]
        with contextlib.ExitStack() as stack:
            stack.enter_context(rounded_once(self._rounding))
            if mtp is not None and trained is not None:
                stack.enter_context(mtp.enabled(trained))
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
        stages = self._parallel.pipeline_size if len(self._model.chunks) > 1 else 1
        return [*micro_batches, *[EMPTY] * (-len(micro_batches) % stages)]

    def _local_rows(self, micro_batch: MicroBatch) -> LocalRows:
        parallel = self._parallel
        multiple = parallel.tensor_size if self._model.config.sequence_parallel else 1
        multiple *= kernels.ROWS if self._model.config.fp8 else 1
        if self._padded:
            return padded_rows(micro_batch, multiple_of=multiple)
        return local_rows(
            micro_batch, context_rank=parallel.context_rank, context_size=parallel.context_size, multiple_of=multiple
        )

    def _average_router_losses(self, rows: Sequence[LocalRows]) -> None:
        """Make the routers' losses of the next passes means over their rows on all replicas; collective.

        Megatron-Core weights them by rows and expects to divide them by tokens with the main loss, but ours already is.
        """
        from megatron.core import parallel_state

        config = self._model.config
        count = torch.tensor([float(sum(len(each.input_ids_L) for each in rows))], device=self._device)
        dist.all_reduce(count, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        config.moe_grad_scale_func = lambda: config.grad_scale_func(1 / count)

    def take_mtp_metrics(self) -> dict[str, float]:
        """The metrics of MTP layers since the last call, where they are trained; collective. See `MtpTraining`."""
        return {} if self._mtp is None else self._mtp.take_metrics()

    def _forward(self, chunk: Any, rows: LocalRows, head: Head = response_logits) -> torch.Tensor:
        """The head's output [1, R, V] on the last stage, else what the next stage takes."""
        output: torch.Tensor = chunk(
            input_ids=self._by_sample(rows.input_ids_L, rows),
            position_ids=self._by_sample(rows.position_ids_L, rows),
            attention_mask=None,  # no row sees later ones, so none of a sample sees padding
            packed_seq_params=None if rows.columns else self._packed(rows),
            output_processor=head,
            output_processor_context=torch.from_numpy(rows.logit_rows).to(self._device),
            **({"fp32_output": False} if self._model.config.bf16 or self._model.config.fp16 else {}),
        )
        return output

    def _by_sample(self, values_L: npt.NDArray[Any], rows: LocalRows) -> torch.Tensor:
        """[1, L], or [S, M] of a padded micro-batch."""
        return torch.from_numpy(rows.by_sample(values_L)).to(self._device)

    def _packed(self, rows: LocalRows) -> Any:
        """Where sequences begin, for Megatron-Core."""
        from megatron.core.packed_seq_params import PackedSeqParams

        starts = torch.from_numpy(rows.cu_seqlens).to(self._device)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            cu_seqlens_q_padded=starts,
            cu_seqlens_kv_padded=starts,
            max_seqlen_q=rows.max_seqlen,
            max_seqlen_kv=rows.max_seqlen,
            pad_between_seqs=False,  # padding rows count as a sequence's; telling so spares a comparison per layer
        )
