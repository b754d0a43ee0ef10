"""Megatron-Core's optimizer, with the learning-rate schedule, clipping and errors that every backend has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from miles.services.trainer.backends.megatron.broken_gradients import broken_gradients
from miles.services.trainer.step import adam_state
from miles.services.trainer.step.finite_gradient import StepOutcome
from miles.services.trainer.step.learning_rate import learning_rate

if TYPE_CHECKING:
    from miles.config.sections.megatron import MegatronConfig
    from miles.config.sections.optimizer import OptimizerConfig as OptimizerSettings
    from miles.services.trainer.backends.megatron.model.build_model import MegatronModel

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Number types by their names in Megatron-LM's flags."""
_SMALLEST_SCALE = 1.0
"""Megatron-Core's default for float16 losses (min_loss_scale)."""


class MegatronOptimizer:
    """AdamW over this rank's parameters or its share of them; vectors and scalars are not decayed.

    With `optimizer_cpu_offload` Megatron-Core's HybridDeviceOptimizer takes Adam's place: it copies gradients to host
    memory, where AdamW updates float32 masters, and copies these into the parameters.
    """

    def __init__(
        self, settings: OptimizerSettings, layout: MegatronConfig, model: MegatronModel, compute: torch.dtype
    ) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self._config = settings
        self._chunks = model.chunks
        self._gathers_later = layout.overlap_param_gather
        self.inner: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.adam_beta1,
                adam_beta2=settings.adam_beta2,
                adam_eps=settings.adam_eps,
                clip_grad=settings.clip_grad,
                params_dtype=compute,
                bf16=compute is torch.bfloat16,
                fp16=compute is torch.float16,
                initial_loss_scale=2.0**14,
                use_distributed_optimizer=layout.use_distributed_optimizer,
                overlap_param_gather=layout.overlap_param_gather,
                use_precision_aware_optimizer=layout.use_precision_aware_optimizer,
                store_param_remainders=False,  # checkpoints have whole masters, which every optimizer can read
                exp_avg_dtype=_DTYPES[layout.exp_avg_dtype],
                exp_avg_sq_dtype=_DTYPES[layout.exp_avg_sq_dtype],
                optimizer_cpu_offload=layout.optimizer_cpu_offload,
                overlap_cpu_optimizer_d2h_h2d=layout.overlap_cpu_optimizer_d2h_h2d,
            ),
            model.chunks,
        )

        def finalize(chunks: list[Any], num_tokens: torch.Tensor | None = None, **others: Any) -> None:
            """Sum gradients over ranks without dividing them: the loss is divided already."""
            finalize_model_grads(chunks, None, **others)

        model.config.finalize_model_grads_func = finalize
        model.config.grad_scale_func = self.inner.scale_loss
        if layout.overlap_grad_reduce:
            syncs = [chunk.no_sync for chunk in model.chunks]
            model.config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
            starts = [chunk.start_grad_sync for chunk in model.chunks]
            model.config.grad_sync_func = starts if len(starts) > 1 else starts[0]

    @property
    def rate(self) -> float:
        """Learning rate of the last step."""
        rate: float = self.inner.param_groups[0]["lr"]
        return rate

    def tensors(self) -> Iterator[torch.Tensor]:
        """What it updates, master parameters or the model's own, and its state; none before the first step."""
        for each in self._optimizers():
            for group in each.param_groups:
                yield from group["params"]
            for state in each.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def reset(self) -> None:
        """Set moments and the count of steps to 0."""
        for each in self._optimizers():
            adam_state.reset(each)

    def _optimizers(self) -> Iterator[torch.optim.Optimizer]:
        """PyTorch's, of dense parameters and of experts; one that offloads comes with its own for each device."""
        for part in getattr(self.inner, "chained_optimizers", [self.inner]):
            yield from (part.optimizer, *getattr(part.optimizer, "sub_optimizers", ()))

    def clear(self) -> None:
        """Discard gradients."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.inner.zero_grad()

    def gather_parameters(self) -> None:
        """All-gather updated parameters now, where that would overlap with the next forward pass."""
        for chunk in self._chunks if self._gathers_later else ():
            chunk.start_param_sync(force_sync=True)

    def step(self, iteration: int, total_iterations: int) -> StepOutcome:
        """Clip and step, unless the gradient is not finite; collective."""
        rate = learning_rate(iteration, self._config, total_iterations)
        for group in self.inner.param_groups:
            group["lr"] = rate
            group["weight_decay"] = self._config.weight_decay * group["wd_mult"]
        if not self.inner.prepare_grads():
            norm = float(self.inner.get_grad_norm())
            if not math.isfinite(norm):
                return StepOutcome(norm, skipped=True, broken=broken_gradients(self._chunks))
        done, norm, _ = self.inner.step()
        if not done or norm is None:  # of float16; the optimizer lowers its scale while that can help
            lowered = float(self.inner.get_loss_scale()) > _SMALLEST_SCALE
            broken = () if lowered else broken_gradients(self._chunks)
            return StepOutcome(math.inf, skipped=True, scale_overflowed=lowered, broken=broken)
        return StepOutcome(float(norm))
