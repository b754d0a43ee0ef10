"""Attention over KV slots, registered with transformers' public AttentionInterface.

The tokens of a step are packed in one row of the batch: the last token and the drafts of each decoding KV slot, then
the prompt chunks one after the other, then padding. Keys and values are written to the cache first; then decoding slots
and prompt chunks attend to it on two paths with the same arithmetic: matmul, softmax, matmul over a multiple of 64
positions, with enough query rows for the matrix library to treat each row alike (see invariance.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AttentionInterface

from miles.services.rollout.engines.torch.model.kv_cache import KVCache

ATTENTION_NAME = "miles_slots"
STEP_ARGUMENT = "miles_step"
"""Keyword under which a forward pass carries its `AttentionStep` down to the attention layers."""

_UNSUPPORTED = ("s_aux",)


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeRows:
    """The first `rows` packed tokens: of each decoding KV slot its last token, then its drafts.

    They are looked at as a rectangle of S slots by Q queries; short slots are filled up with some other token.
    """

    rows: int
    slots: int
    """Slots 0 to `slots` - 1 are attended to; they hold every decoding slot."""
    queries: int
    packed_SQ: torch.Tensor | None
    """Index in the pack of each query, int64; None when the packed tokens are the rectangle."""
    places_N: torch.Tensor | None
    """For each packed token in order, its place in the flattened rectangle, int64; None likewise."""
    length: int
    mask_S11QT: torch.Tensor
    """0 where a query may look, -inf elsewhere; in the model's dtype."""


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillRows:
    """Prompt chunks as a rectangle of C chunks by Q queries; short chunks are padded with some other token."""

    packed_CQ: torch.Tensor
    """Index in the pack of each query, int64."""
    chunk_N: torch.Tensor
    query_N: torch.Tensor
    """For each packed prompt token in order: its chunk and its place in the chunk, int64."""
    slots_C: torch.Tensor
    length: int
    mask_C11QT: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionStep:
    """What the attention layers need to know about one forward pass."""

    cache: KVCache
    slots_N: torch.Tensor
    positions_N: torch.Tensor
    """Slot and position of every token that is not padding, int64."""
    decode: DecodeRows | None
    prefill: PrefillRows | None
    min_queries: int
    """Query rows below which an attention matmul is padded."""


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from query (1, heads, tokens, head dim) through the cache; returns (1, tokens, heads, head dim).

    A soft cap c bounds scores to c tanh(score / c). Windows are not looked at: `read_config` refuses longer sequences.
    """
    step: AttentionStep | None = kwargs.get(STEP_ARGUMENT)
    if step is None:
        raise NotImplementedError(f"{type(module).__name__} got no {STEP_ARGUMENT}: its model drops unknown arguments")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} needs {name}={kwargs[name]!r}, which this engine lacks")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    tokens = step.slots_N.shape[0]
    query_NHD = query[0].transpose(0, 1)
    step.cache.write(
        layer, step.slots_N, step.positions_N, key[0].transpose(0, 1)[:tokens], value[0].transpose(0, 1)[:tokens]
    )
    parts: list[torch.Tensor] = []
    if step.decode is not None:
        parts.append(_decode(query_NHD, step, step.decode, layer, scale, softcap))
    if step.prefill is not None:
        parts.append(_prefill(query_NHD, step, step.prefill, layer, scale, softcap))
    padding = query_NHD.shape[0] - tokens
    if padding:
        parts.append(query_NHD.new_zeros(padding, *parts[0].shape[1:]))
    output_NHD = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output_NHD[None], None


def _decode(
    query_NHD: torch.Tensor, step: AttentionStep, rows: DecodeRows, layer: int, scale: float, softcap: float | None
) -> torch.Tensor:
    """Output (rows, heads, head dim) of the decoding tokens. S slots, Q queries, K kv heads, G heads a kv head."""
    query_NHD = query_NHD[: rows.rows]
    heads, dim = query_NHD.shape[1:]
    slots, queries = rows.slots, rows.queries
    keys_SKDT = step.cache.keys_LSHDT[layer, :slots, ..., : rows.length]
    values_SKTD = step.cache.values_LSHTD[layer, :slots, :, : rows.length]
    kv_heads = keys_SKDT.shape[1]
    group = heads // kv_heads
    if rows.packed_SQ is not None:
        query_NHD = query_NHD[rows.packed_SQ.flatten()]
    query_SKGQD = query_NHD.view(slots, queries, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    query_SKRD = query_SKGQD.reshape(slots, kv_heads, group * queries, dim)
    mask_S1RT = rows.mask_S11QT[:, :, 0]
    if queries > 1:
        mask_S1RT = rows.mask_S11QT.expand(-1, -1, group, -1, -1).flatten(2, 3)
    missing = max(0, step.min_queries - group * queries)
    if missing:
        query_SKRD = torch.nn.functional.pad(query_SKRD, (0, 0, 0, missing))
        if queries > 1:
            mask_S1RT = torch.nn.functional.pad(mask_S1RT, (0, 0, 0, missing))
    output_SKRD = _attend(query_SKRD, keys_SKDT, values_SKTD, mask_S1RT, scale, softcap)[:, :, : group * queries]
    output_SQKGD = output_SKRD.reshape(slots, kv_heads, group, queries, -1).permute(0, 3, 1, 2, 4)
    output_NHD = output_SQKGD.reshape(slots * queries, heads, -1)
    return output_NHD if rows.places_N is None else output_NHD[rows.places_N]


def _prefill(
    query_NHD: torch.Tensor, step: AttentionStep, rows: PrefillRows, layer: int, scale: float, softcap: float | None
) -> torch.Tensor:
    """Output (prompt tokens, heads, head dim) of the prompt chunks, in packed order."""
    keys_CKDT = step.cache.keys_LSHDT[layer, rows.slots_C, ..., : rows.length]
    values_CKTD = step.cache.values_LSHTD[layer, rows.slots_C, :, : rows.length]
    chunks, kv_heads = keys_CKDT.shape[:2]
    queries, dim = rows.packed_CQ.shape[1], query_NHD.shape[-1]
    query_CQKGD = query_NHD[rows.packed_CQ].view(chunks, queries, kv_heads, -1, dim)
    group = query_CQKGD.shape[3]
    query_CKRD = query_CQKGD.permute(0, 2, 3, 1, 4).reshape(chunks, kv_heads, group * queries, dim)
    mask_C1RT = rows.mask_C11QT.expand(-1, -1, group, -1, -1).flatten(2, 3)
    output_CKRD = _attend(query_CKRD, keys_CKDT, values_CKTD, mask_C1RT, scale, softcap)
    dim = output_CKRD.shape[-1]
    output_CQKGD = output_CKRD.view(chunks, kv_heads, group, queries, dim).permute(0, 3, 1, 2, 4)
    return output_CQKGD[rows.chunk_N, rows.query_N].reshape(rows.chunk_N.shape[0], kv_heads * group, dim)


def _attend(
    query_BKRD: torch.Tensor,
    keys_BKDT: torch.Tensor,
    values_BKTD: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    scores_BKRT = torch.matmul(query_BKRD, keys_BKDT)
    if softcap is not None:
        scores_BKRT, scale = torch.tanh(scores_BKRT * (scale / softcap)), softcap
    weights_BKRT = torch.add(mask, scores_BKRT, alpha=scale).softmax(-1)
    return torch.matmul(weights_BKRT, values_BKTD)


AttentionInterface.register(ATTENTION_NAME, slot_attention)
