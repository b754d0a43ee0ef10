"""The forward pass of a scheduler plan: one packed row of tokens in, the logits to sample from out."""

from __future__ import annotations

import dataclasses

import torch

from miles.services.rollout.engines.torch.generation.scheduler import Chunk, Plan
from miles.services.rollout.engines.torch.generation.sequence import Sequence
from miles.services.rollout.engines.torch.model.attention import STEP_ARGUMENT, AttentionStep, DecodeRows, PrefillRows
from miles.services.rollout.engines.torch.model.invariance import Padding
from miles.services.rollout.engines.torch.model.kv_cache import KVCache, attention_length
from miles.services.rollout.engines.torch.model.spans import Span, prefill_rows


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """The packed tokens of a step."""

    tokens: list[int]
    slots: list[int]
    positions: list[int]
    drawing: list[Sequence]
    """Sequences that get a token from this step, or several."""
    rows: list[int]
    """For each of them, and each of its drafts, the packed token whose logits are sampled from."""


def pack(plan: Plan) -> Packed:
    """Pack the plan's tokens: of decoding KV slots first, the last one and its drafts, then prompt chunks."""
    packed = Packed([], [], [], [], [])
    row_of: dict[int, int] = {}
    for sequence in plan.decode:
        first, start, drafts = len(packed.tokens), len(sequence.tokens) - 1, len(sequence.drafts)
        packed.tokens.extend([sequence.tokens[-1], *sequence.drafts])
        packed.slots.extend([sequence.slot] * (1 + drafts))
        packed.positions.extend(range(start, start + 1 + drafts))
        packed.rows.extend(range(first, first + 1 + drafts))
        row_of[sequence.slot] = first
        packed.drawing.append(sequence)
    for chunk in plan.prefill:
        packed.tokens.extend(chunk.sequence.tokens[chunk.start : chunk.end])
        packed.slots.extend([chunk.sequence.slot] * (chunk.end - chunk.start))
        packed.positions.extend(range(chunk.start, chunk.end))
        row_of[chunk.sequence.slot] = len(packed.tokens) - 1
        if chunk.completes:
            packed.drawing.append(chunk.sequence)
            packed.rows.append(row_of[chunk.sequence.slot])
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
        lengths = [len(s.tokens) + len(s.drafts) for s in plan.decode] + [chunk.end for chunk in plan.prefill]
        lengths += [copy.length for copy in plan.copies]
        if slots:
            self._cache.reserve(max(slots) + 1, max(lengths))
        for move in plan.moves:
            self._cache.copy(move.source, [move.target], move.length)
        for copy in plan.copies:
            self._cache.copy(copy.source.slot, [copy.target.slot], copy.length)

    def run(self, plan: Plan, packed: Packed) -> torch.Tensor:
        """Run one forward pass. Returns logits (R, vocabulary): row i for `packed.rows[i]`, then padding rows."""
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
            prefill=self._prefill_rows(plan.prefill, _decoding(plan)) if plan.prefill else None,
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

    def _tensor(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device, non_blocking=True)

    def _decode_rows(self, decode: list[Sequence]) -> DecodeRows:
        slots = decode[-1].slot + 1
        queries = 1 + max(len(sequence.drafts) for sequence in decode)
        length = attention_length(max(len(sequence.tokens) + len(sequence.drafts) for sequence in decode))
        seen_SQ, packed_SQ = [[1] * queries] * slots, [[0] * queries] * slots
        places: list[int] = []
        first = 0
        for sequence in decode:
            own = [min(query, len(sequence.drafts)) for query in range(queries)]
            seen_SQ[sequence.slot] = [len(sequence.tokens) + query for query in own]
            packed_SQ[sequence.slot] = [first + query for query in own]
            places += range(sequence.slot * queries, sequence.slot * queries + 1 + len(sequence.drafts))
            first += 1 + len(sequence.drafts)
        positions_T = torch.arange(length, device=self._device)
        hidden_SQT = positions_T >= self._tensor(seen_SQ)[..., None]
        whole = first == slots * queries
        return DecodeRows(
            rows=first,
            slots=slots,
            queries=queries,
            packed_SQ=None if whole else self._tensor(packed_SQ),
            places_N=None if whole else self._tensor(places),
            length=length,
            mask_S11QT=self._mask(hidden_SQT)[:, None, None],
        )

    def _prefill_rows(self, prefill: list[Chunk], first: int) -> PrefillRows:
        spans = [Span(chunk.sequence.slot, chunk.start, chunk.end) for chunk in prefill]
        length = attention_length(max(span.end for span in spans))
        return prefill_rows(spans, length, self._dtype, self._device, first=first, queries=self._padding.queries)

    def _mask(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, -torch.inf)


def _decoding(plan: Plan) -> int:
    """Packed tokens of decoding sequences."""
    return sum(1 + len(sequence.drafts) for sequence in plan.decode)
