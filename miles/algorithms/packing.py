"""Packed tensors: the response tokens of several samples in one flat tensor.

All formulas of this package work on packed tensors: the tokens of all samples in sequence in a tensor of shape [T],
with a `Packing` that has the length of each sample. Suffixes: `_T` packed tokens, `_B` one entry
a sample, `_BT` padded (one row a sample, filled from the left).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from miles.algorithms.device_copies import to_device


def as_float(x: torch.Tensor) -> torch.Tensor:
    """Upcast to the dtype that formulas are evaluated in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def keep_where(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x` where `mask` is set and 0 elsewhere, in float32 (float64 stays).

    Values at masked positions, also NaN and infinities, affect neither the forward nor the backward pass.
    """
    return torch.where(mask.bool(), as_float(x), 0.0)


LOWEST_LOG_PROB = -1e4
"""Log-probs below it count as this much: far below every log-prob of a token that was sampled."""


def keep_log_probs(mask: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """`keep_where` of log-probs; -inf, of a token that is impossible, counts as `LOWEST_LOG_PROB` without gradient.

    So losses and ratios stay finite: the difference of two infinities would be NaN.
    """
    return keep_where(mask, log_probs).clamp_min(LOWEST_LOG_PROB)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Lengths of the consecutive samples in a packed tensor."""

    lengths: tuple[int, ...]
    """Tokens of each sample; 0 is allowed."""

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor | Sequence[int]) -> Packing:
        """From cumulative lengths [0, l0, l0 + l1, ...], B + 1 integers.

        Raises:
            ValueError: they do not start at 0 or they descend.
        """
        ends = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else list(cu_seqlens)
        if not ends or ends[0] != 0 or any(b < a for a, b in itertools.pairwise(ends)):
            raise ValueError(f"cu_seqlens must start at 0 and never descend, got {ends}")
        return cls(tuple(b - a for a, b in itertools.pairwise(ends)))

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.lengths)

    @functools.cached_property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    def cu_seqlens(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Cumulative lengths, int32 [B + 1]."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=device)

    def check(self, **tensors_T: torch.Tensor | None) -> None:
        """Raise ValueError naming the first given tensor whose shape is not [T]."""
        for name, x_T in tensors_T.items():
            if x_T is not None and tuple(x_T.shape) != (self.num_tokens,):
                raise ValueError(f"{name} has shape {tuple(x_T.shape)}, but the packing holds {self.num_tokens} tokens")

    def split(self, x_T: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One view a sample."""
        return torch.split(x_T, list(self.lengths)) if self.lengths else ()

    def sum(self, x_T: torch.Tensor) -> torch.Tensor:
        """Sum of each sample's tokens, [B], in the type of `x_T` (int64 for integers).

        Each sample is summed on its own, one token after the other in float64, so its sum does not depend on its
        neighbours in the pack and is bitwise reproducible on every device (a scatter-add would not be).
        """
        sums_B: torch.Tensor = _SumTokens.apply(x_T, self._on(x_T.device))  # type: ignore[no-untyped-call]
        return sums_B

    def mean(self, x_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
        """Mean over each sample's unmasked tokens, [B]; 0 for a sample that has none."""
        kept_T = keep_where(mask_T, x_T)
        return self.sum(kept_T) / self.sum(mask_T.to(kept_T.dtype)).clamp_min(1)

    def expand(self, x_B: torch.Tensor) -> torch.Tensor:
        """Repeat each sample's value over its tokens, [T]."""
        expanded_T: torch.Tensor = _RepeatOverTokens.apply(x_B, self._on(x_B.device))  # type: ignore[no-untyped-call]
        return expanded_T

    def pack(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Padded rows [B, max length or more, ...] to packed [T, ...]; padding is dropped."""
        if x_BT.shape[0] != self.num_samples or x_BT.shape[1] < max(self.lengths, default=0):
            raise ValueError(
                f"padded tensor of shape {tuple(x_BT.shape)} cannot hold samples of lengths {self.lengths}"
            )
        if not self.lengths:
            return x_BT.new_zeros(0, *x_BT.shape[2:])
        return torch.cat([row[:length] for row, length in zip(x_BT.unbind(), self.lengths, strict=True)])

    def unpack(self, x_T: torch.Tensor, padding_value: float = 0.0) -> torch.Tensor:
        """Packed [T, ...] to padded rows [B, max length, ...]."""
        if not self.lengths:
            return x_T.new_zeros(0, 0, *x_T.shape[1:])
        return torch.nn.utils.rnn.pad_sequence(list(self.split(x_T)), batch_first=True, padding_value=padding_value)

    def take(self, x_T: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """The tokens of some samples, packed in the order given."""
        parts = self.split(x_T)
        return torch.cat([parts[i] for i in samples]) if len(samples) else x_T[:0]

    def subset(self, samples: Sequence[int]) -> Packing:
        """The packing of what `take` returns."""
        return Packing(tuple(self.lengths[i] for i in samples))

    def _on(self, device: torch.device) -> _Layout:
        """The layout as tensors of a device, which are made once."""
        if device not in self._layouts:
            lengths_B = to_device(torch.tensor(self.lengths, dtype=torch.int64), device)
            samples_B = torch.arange(self.num_samples, device=device)
            samples_T = torch.repeat_interleave(samples_B, lengths_B, output_size=self.num_tokens)
            self._layouts[device] = _Layout(lengths_B, samples_T)
        return self._layouts[device]

    @functools.cached_property
    def _layouts(self) -> dict[torch.device, _Layout]:
        return {}


@dataclasses.dataclass(frozen=True, slots=True)
class _Layout:
    """A packing on a device; int64."""

    lengths_B: torch.Tensor
    sample_T: torch.Tensor
    """Which sample each token is of."""


class _SumTokens(torch.autograd.Function):
    """Sums within samples; the gradient of a token is its sample's."""

    @staticmethod
    def forward(ctx: Any, x_T: torch.Tensor, layout: _Layout) -> torch.Tensor:
        ctx.layout = layout
        return _sums(x_T, layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        (grad_B,) = gradients
        return grad_B.index_select(0, ctx.layout.sample_T), None


class _RepeatOverTokens(torch.autograd.Function):
    """Repeats samples' values; the gradient of a sample is the sum over its tokens."""

    @staticmethod
    def forward(ctx: Any, x_B: torch.Tensor, layout: _Layout) -> torch.Tensor:
        ctx.layout = layout
        return x_B.index_select(0, layout.sample_T)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        (grad_T,) = gradients
        return _sums(grad_T, ctx.layout), None


def _sums(x_T: torch.Tensor, layout: _Layout) -> torch.Tensor:
    dtype = x_T.dtype if x_T.is_floating_point() else torch.int64
    if not len(layout.lengths_B):
        return x_T.new_zeros(0, dtype=dtype)
    # `unsafe` leaves out a check of the lengths that would wait for the GPU.
    sums_B = torch.segment_reduce(x_T.double(), "sum", lengths=layout.lengths_B, unsafe=True)
    return sums_B.to(dtype)
