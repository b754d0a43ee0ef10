"""Attention of many short segments in few matrix products.

A segment's queries make up a block of L query slots, and the rows that they may see a block of M key slots, in which a
row's slot is its position. Blocks of about the same size lie together in a tile. Scores, softmax and weighted sum are
plain matrix products, in the order and the number type of an engine that decodes over slots of a key/value cache: where
the matrix library treats each row alike, the result is the engine's bit for bit.

Dims: T rows, H query heads, K key/value heads, G = H / K, D head size, V that of values, B blocks of a tile, S slots
of all tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from miles.services.trainer.backends.fsdp.attention.slots import from_slots, slots_of, to_slots
from miles.services.trainer.batch.packing import Segment

QUERY_MULTIPLE = 16
"""L is a multiple of this: fewer rows may take another kernel, which rounds differently."""
KEY_MULTIPLE = 64
"""M is a multiple of this, for the same reason."""
MAX_SCORES = 2**21
"""Scores per head that a micro-batch may have in tiles; each layer keeps them for the backward pass."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Tile:
    """B blocks of L query slots and M key slots."""

    blocks: int
    queries: int
    keys: int
    hidden_B11LM: torch.Tensor
    """bool; True where the query slot may not attend to the key slot. Padded queries attend to every slot."""


class TilePlan:
    """Tiles of one micro-batch under one sliding window (None: full attention)."""

    def __init__(self, segments: Sequence[Segment], window: int | None, device: torch.device) -> None:
        rows = segments[-1].end
        queries: list[npt.NDArray[np.int64]] = []
        keys: list[npt.NDArray[np.int64]] = []
        self.tiles: list[_Tile] = []
        for members in _buckets(segments):
            query_rows_BL, key_rows_BM, hidden_BLM = _tile_rows(members, window)
            queries.append(query_rows_BL.ravel())
            keys.append(key_rows_BM.ravel())
            hidden = torch.from_numpy(hidden_BLM)[:, None, None].to(device)
            self.tiles.append(_Tile(len(members), query_rows_BL.shape[1], key_rows_BM.shape[1], hidden))
        self.queries = slots_of(np.concatenate(queries), rows, device)
        self.keys = slots_of(np.concatenate(keys), rows, device)


def fits_tiles(segments: Sequence[Segment]) -> bool:
    """Whether the scores of all blocks are few enough to keep."""
    return sum(_block_size(s)[0] * _block_size(s)[1] for s in segments) <= MAX_SCORES


def capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Scores between -c and c for a soft cap c (Gemma 2, arXiv 2408.00118); unchanged without one."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def attend_tiles(
    plan: TilePlan,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKV: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(q k scale) v over what each row may see, scores capped first; [T, H, V]."""
    kv_heads, dim = k_TKD.shape[1:]
    value_dim = v_TKV.shape[2]
    group = q_THD.shape[1] // kv_heads
    q_S = torch.split(to_slots(q_THD, plan.queries), [tile.blocks * tile.queries for tile in plan.tiles])
    sizes = [tile.blocks * tile.keys for tile in plan.tiles]
    k_S, v_S = (torch.split(to_slots(x, plan.keys), sizes) for x in (k_TKD, v_TKV))
    outs = []
    for tile, q, k, v in zip(plan.tiles, q_S, k_S, v_S, strict=True):
        q_BKGLD = q.view(tile.blocks, tile.queries, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
        k_BKDM = k.view(tile.blocks, tile.keys, kv_heads, dim).permute(0, 2, 3, 1)
        v_BKMV = v.view(tile.blocks, tile.keys, kv_heads, value_dim).transpose(1, 2)
        scores_BKRM = torch.matmul(q_BKGLD.reshape(tile.blocks, kv_heads, group * tile.queries, dim), k_BKDM) * scale
        scores_BKGLM = scores_BKRM.view(tile.blocks, kv_heads, group, tile.queries, tile.keys)
        weights_BKGLM = capped(scores_BKGLM, softcap).masked_fill(tile.hidden_B11LM, -torch.inf).softmax(-1)
        out_BKRV = torch.matmul(weights_BKGLM.flatten(2, 3), v_BKMV)
        out_BLKGV = out_BKRV.view(tile.blocks, kv_heads, group, tile.queries, value_dim).permute(0, 3, 1, 2, 4)
        outs.append(out_BLKGV.reshape(-1, q_THD.shape[1], value_dim))
    return from_slots(torch.cat(outs), plan.queries)


def _buckets(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments whose blocks have the same size."""
    buckets: dict[tuple[int, int], list[Segment]] = {}
    for segment in segments:
        buckets.setdefault(_block_size(segment), []).append(segment)
    return [buckets[size] for size in sorted(buckets)]


def _block_size(segment: Segment) -> tuple[int, int]:
    """L and M of a segment's block."""
    keys = segment.prefix_rows + segment.rows
    return _round_up(segment.rows, QUERY_MULTIPLE), _round_up(keys, KEY_MULTIPLE)


def _tile_rows(
    segments: Sequence[Segment], window: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Query rows [B, L] and key rows [B, M], -1 where padded, and what queries may not see [B, L, M]."""
    queries, keys = _block_size(segments[0])
    query_rows = np.full((len(segments), queries), -1, np.int64)
    key_rows = np.full((len(segments), keys), -1, np.int64)
    hidden = np.zeros((len(segments), queries, keys), np.bool_)
    for b, segment in enumerate(segments):
        seen, count, prefix = segment.seen_rows(), segment.rows, segment.prefix_rows
        query_rows[b, :count] = seen[prefix:]
        key_rows[b, : len(seen)] = seen
        distance = np.arange(prefix, prefix + count)[:, None] - np.arange(keys)[None]
        hidden[b, :count] = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return query_rows, key_rows, hidden


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
