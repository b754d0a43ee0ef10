"""Which rank trains on which samples, and in which micro-batch: pure functions of lengths, the same on every rank.

Work is split into units: one sample, or with shared prompts a run of samples of one group, which share rows.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

from miles.services.trainer.batch.packing import RowCounter, row_count
from miles.types import Sample


@dataclasses.dataclass(frozen=True, slots=True)
class MicroBatchLimits:
    """How large a micro-batch may be: by rows when `max_rows` is set, else by samples."""

    max_samples: int
    max_rows: int | None = None
    padded: bool = False
    """Whether samples are padded to the longest of their micro-batch, and padding counts as rows."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Unit:
    indices: tuple[int, ...]
    rows: int


def schedule(
    samples: Sequence[Sample], indices: Sequence[int], ranks: int, limits: MicroBatchLimits, *, share_prompts: bool
) -> list[list[tuple[int, ...]]]:
    """Split `samples[i] for i in indices` over ranks and cut each rank's share into micro-batches.

    Returns, per rank, the sample indices of each micro-batch. Every rank gets the same number of micro-batches, short
    ones filled up with empty tuples, because ranks meet in collectives once per micro-batch. A sample longer than
    `max_rows` gets a micro-batch of its own.
    """
    units = _units(samples, indices, ranks, limits, share_prompts=share_prompts)
    shares = partition([unit.rows for unit in units], ranks)
    return _even_out([_fill([units[i] for i in share], limits) for share in shares])


def recut(
    samples: Sequence[Sample], shares: Sequence[Sequence[int]], limits: MicroBatchLimits, *, share_prompts: bool
) -> list[list[tuple[int, ...]]]:
    """Cut shares that ranks already have into other micro-batches; the result is like that of `schedule`."""
    per_rank = [
        _fill(_units(samples, sorted(share), 1, limits, share_prompts=share_prompts), limits) for share in shares
    ]
    return _even_out(per_rank)


def partition(weights: Sequence[int], parts: int) -> list[list[int]]:
    """Split items into `parts` lists of indices with nearly equal weight (Karmarkar–Karp largest differencing).

    Deterministic; each list ascends. Karmarkar and Karp 1982, extended to k parts by merging the heaviest part of one
    partial solution with the lightest of the other.
    """
    if parts == 1:
        return [list(range(len(weights)))]
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for i, weight in enumerate(weights):
        heap.append((-weight, i, [(weight, [i])] + [(0, []) for _ in range(parts - 1)]))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, order, heavy = heapq.heappop(heap)
        _, other_order, light = heapq.heappop(heap)
        merged = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(heavy, reversed(light), strict=True)]
        merged.sort(key=lambda part: (-part[0], part[1]))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], min(order, other_order), merged))
    return [sorted(items) for _, items in heap[0][2]] if heap else [[] for _ in range(parts)]


def _even_out(per_rank: Sequence[list[tuple[int, ...]]]) -> list[list[tuple[int, ...]]]:
    longest = max((len(micro_batches) for micro_batches in per_rank), default=0)
    return [micro_batches + [()] * (longest - len(micro_batches)) for micro_batches in per_rank]


def _units(
    samples: Sequence[Sample], indices: Sequence[int], ranks: int, limits: MicroBatchLimits, *, share_prompts: bool
) -> list[_Unit]:
    """Cut the samples, in their order, into units that fit a micro-batch, with enough of them to occupy every rank."""
    if not share_prompts:
        return [_Unit((i,), row_count(samples, (i,), share_prompts=False)) for i in indices]
    bounds = [] if limits.max_rows is None else [limits.max_rows]
    if ranks > 1:
        bounds.append(max(1, row_count(samples, indices, share_prompts=True) // ranks))
    max_rows = min(bounds, default=None)
    units: list[_Unit] = []
    run: list[int] = []
    counter = RowCounter(share_prompts=True)
    for i in indices:
        added = counter.added_by(samples[i])
        fits = (
            bool(run)
            and samples[run[-1]].group_id == samples[i].group_id
            and (limits.max_rows is not None or len(run) < limits.max_samples)
            and (max_rows is None or counter.rows + added <= max_rows)
        )
        if run and not fits:
            units.append(_Unit(tuple(run), counter.rows))
            run, counter = [], RowCounter(share_prompts=True)
            added = counter.added_by(samples[i])
        run.append(i)
        counter.add(samples[i], added)
    if run:
        units.append(_Unit(tuple(run), counter.rows))
    return units


def _fill(units: Sequence[_Unit], limits: MicroBatchLimits) -> list[tuple[int, ...]]:
    """Cut one rank's units into micro-batches: in order by samples, or first fit by decreasing rows."""
    if limits.max_rows is None:
        return _fill_by_samples(units, limits.max_samples)
    bins: list[tuple[int, list[_Unit]]] = []
    for unit in sorted(units, key=lambda unit: (-unit.rows, unit.indices)):
        for position, (rows, members) in enumerate(bins):
            added = members[0].rows if limits.padded else unit.rows  # the first one is the longest
            if rows + added <= limits.max_rows:
                members.append(unit)
                bins[position] = (rows + added, members)
                break
        else:
            bins.append((unit.rows, [unit]))
    filled = [sorted(members, key=lambda unit: unit.indices) for _, members in bins]
    return [tuple(i for unit in members for i in unit.indices) for members in filled]


def _fill_by_samples(units: Sequence[_Unit], max_samples: int) -> list[tuple[int, ...]]:
    micro_batches: list[tuple[int, ...]] = []
    current: tuple[int, ...] = ()
    for unit in units:
        if current and len(current) + len(unit.indices) > max_samples:
            micro_batches.append(current)
            current = ()
        current += unit.indices
    return [*micro_batches, current] if current else micro_batches
