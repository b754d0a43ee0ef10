"""The keys and values of a draft model: KV slots of its own, and the rows of one of its forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from miles.services.rollout.engines.torch.model.architecture import ModelShape
from miles.services.rollout.engines.torch.model.attention import AttentionStep
from miles.services.rollout.engines.torch.model.kv_cache import LENGTH_MULTIPLE, KVCache, round_up
from miles.services.rollout.engines.torch.model.spans import Span, prefill_rows

MAX_ROWS = 4096
"""Rows of a forward pass at most, padding included."""


class DraftCache:
    """A KV cache whose slots are given to requests on demand."""

    def __init__(
        self, shape: ModelShape, *, max_slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._device, self._dtype = device, dtype
        self._free = list(range(max_slots))[::-1]
        self.cache = KVCache(
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            value_dim=shape.value_dim,
            max_slots=max_slots,
            max_length=max_length,
            dtype=dtype,
            device=device,
        )

    def take_slot(self) -> int:
        """A slot for another request; there are as many as requests run at once."""
        return self._free.pop()

    def free_slot(self, slot: int) -> None:
        """Return a slot."""
        self._free.append(slot)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        self.cache.reserve(max(source, target) + 1, length)
        self.cache.copy(source, [target], length)

    def step(self, spans: Sequence[Span]) -> AttentionStep:
        """Make room for the rows of a forward pass, span behind span, and say what each may look at."""
        self.cache.reserve(max(span.slot for span in spans) + 1, max(span.end for span in spans))
        length = round_up(max(span.end for span in spans), LENGTH_MULTIPLE)
        rows = prefill_rows(spans, length, self._dtype, self._device)
        return AttentionStep(
            cache=self.cache,
            slots_N=rows.slots_C[rows.chunk_N],
            positions_N=self.tensor([position for span in spans for position in range(span.start, span.end)]),
            decode=None,
            prefill=rows,
            min_queries=1,
        )

    def tensor(self, values: Sequence[int]) -> torch.Tensor:
        """Whole numbers on the device, int64."""
        return torch.tensor(values, dtype=torch.int64).to(self._device, non_blocking=True)


def passes(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Split spans, in order, into forward passes of at most `MAX_ROWS` rows."""
    pending: list[Span] = []
    for span in spans:
        for start in range(span.start, span.end, MAX_ROWS):
            part = Span(span.slot, start, min(span.end, start + MAX_ROWS))
            longest = max(each.rows for each in [*pending, part])
            if pending and longest * (len(pending) + 1) > MAX_ROWS:
                yield pending
                pending = []
            pending.append(part)
    if pending:
        yield pending
