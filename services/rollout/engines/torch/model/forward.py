"""The forward pass of a scheduler plan: one packed row of tokens in, the logits to sample from out."""

from __future__ import annotations

import dataclasses

import torch

from miles.services.rollout.engines.torch.generation.scheduler import Chunk, Plan
from miles.services.rollout.engines.torch.generation.sequence import Sequence
from miles.services.rollout.engines.torch.model.attention import STEP_ARGUMENT, AttentionStep, DecodeRows, PrefillRows
from miles.services.rollout.engines.torch.model.invariance import Padding
from miles.services.rollout.engines.torch.model.kv_cache import LENGTH_MULTIPLE, KVCache, round_up


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """The packed tokens of a step."""

    tokens: list[int]
    slots: list[int]
    positions: list[int]
    drawing: list[Sequence]
    """Sequences that get a token from this step."""
    rows: list[int]
    """For each of them, the packed token whose logits it samples from."""


def pack(plan: Plan) -> Packed:
    """Pack the plan's tokens: decoding KV slots first, then prompt chunks."""
    packed = Packed([], [], [], [], [])
    row_of: dict[int, int] = {}
    for sequence in plan.decode:
        packed.tokens.append(sequence.tokens[-1])
        packed.slots.append(sequence.slot)
        packed.positions.append(len(sequence.tokens) - 1)
        row_of[sequence.slot] = len(packed.tokens) - 1
        packed.drawing.append(sequence)
    for chunk in plan.prefill:
        packed.tokens.extend(chunk.sequence.tokens[chunk.start : chunk.end])
        packed.slots.extend([chunk.sequence.slot] * (chunk.end - chunk.start))
        packed.positions.extend(range(chunk.start, chunk.end))
        row_of[chunk.sequence.slot] = len(packed.tokens) - 1
        if chunk.completes:
            packed.drawing.append(chunk.sequence)
    packed.rows.extend(row_of[sequence.slot] for sequence in packed.drawing)
    for share in plan.shares:
        packed.drawing.append(share.target)
        packed.rows.append(row_of[share.source.slot])
    return packed


class Forward:
    """Runs plans on a model and its cache."""

    def __init__(
        self, model: torch.nn.Module, cache: KVCache, *, dtype: torch.dtype, device: torch.device, padding: Padding
    ) -> None:
        self._model = model
        self._cache = cache
        self._dtype = dtype
        self._device = device
        self._padding = padding

    def prepare(self, plan: Plan) -> None:
        """Reserve room in the cache and carry out the plan's moves and copies."""
        slots = [sequence.slot for sequence in plan.decode] + [chunk.sequence.slot for chunk in plan.prefill]
        slots += [copy.target.slot for copy in (*plan.copies, *plan.shares)]
        lengths = [len(s.tokens) for s in plan.decode] + [chunk.end for chunk in plan.prefill]
        lengths += [copy.length for copy in plan.copies]
        if slots:
            self._cache.reserve(max(slots) + 1, max(lengths))
        for move in plan.moves:
            self._cache.copy(move.source, [move.target], move.length)
        for copy in plan.copies:
            self._cache.copy(copy.source.slot, [copy.target.slot], copy.length)

    def run(self, plan: Plan, packed: Packed) -> torch.Tensor:
        """Run one forward pass. Returns logits (R, vocabulary): row i for `packed.drawing[i]`, then padding rows."""
        count = len(packed.tokens)
        padding = [0] * self._padding.tokens.missing(count)
        tokens = self._tensor(packed.tokens + padding)[None]
        positions = self._tensor(packed.positions + padding)[None]
        rows = packed.rows + [0] * self._padding.logits.missing(len(packed.rows))
        step = AttentionStep(
            cache=self._cache,
            slots_N=self._tensor(packed.slots),
            positions_N=positions[0, :count],
            decode=self._decode_rows(plan.decode) if plan.decode else None,
            prefill=self._prefill_rows(plan.prefill, len(plan.decode)) if plan.prefill else None,
            min_queries=self._padding.queries,
        )
        output = self._model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=self._tensor(rows),
            **{STEP_ARGUMENT: step},
        )
        for share in plan.shares:
            self._cache.copy(share.source.slot, [share.target.slot], share.length)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device, non_blocking=True)

    def _decode_rows(self, decode: list[Sequence]) -> DecodeRows:
        slots = decode[-1].slot + 1
        length = round_up(max(len(sequence.tokens) for sequence in decode), LENGTH_MULTIPLE)
        seen = [1] * slots
        for sequence in decode:
            seen[sequence.slot] = len(sequence.tokens)
        positions_T = torch.arange(length, device=self._device)
        hidden_ST = positions_T[None] >= self._tensor(seen)[:, None]
        return DecodeRows(
            rows=len(decode),
            slots=slots,
            slots_N=None if len(decode) == slots else self._tensor([sequence.slot for sequence in decode]),
            length=length,
            mask_S11T=self._mask(hidden_ST)[:, None, None],
        )

    def _prefill_rows(self, prefill: list[Chunk], first: int) -> PrefillRows:
        queries = max(max(chunk.end - chunk.start for chunk in prefill), self._padding.queries)
        length = round_up(max(chunk.end for chunk in prefill), LENGTH_MULTIPLE)
        lengths_C = self._tensor([chunk.end - chunk.start for chunk in prefill])
        starts_C = self._tensor([chunk.start for chunk in prefill])
        ends_C = lengths_C.cumsum(0)
        query_Q = torch.arange(queries, device=self._device)
        in_chunk_CQ = torch.minimum(query_Q[None], lengths_C[:, None] - 1)
        chunk_N = torch.repeat_interleave(torch.arange(len(prefill), device=self._device), lengths_C)
        first_C = ends_C - lengths_C
        total_N = torch.arange(chunk_N.shape[0], device=self._device)
        seen_CQ = starts_C[:, None] + in_chunk_CQ + 1
        hidden_CQT = torch.arange(length, device=self._device)[None, None] >= seen_CQ[..., None]
        return PrefillRows(
            packed_CQ=first + first_C[:, None] + in_chunk_CQ,
            chunk_N=chunk_N,
            query_N=total_N - first_C[chunk_N],
            slots_C=self._tensor([chunk.sequence.slot for chunk in prefill]),
            length=length,
            mask_C11QT=self._mask(hidden_CQT)[:, None, None],
        )

    def _mask(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, -torch.inf)
