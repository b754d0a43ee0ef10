"""Metrics of micro-batches and ranks, which add up to those of one process: means as sums and counts, and maxima."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from miles.algorithms.collectives import all_reduce_max, all_reduce_sum

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class MetricSum:
    """A mean that is not divided yet."""

    total: torch.Tensor
    """0-d, no gradient."""
    count: float


@dataclasses.dataclass(frozen=True)
class MetricMax(MetricSum):
    """A maximum, which is `total`; of several the largest counts."""

    count: float = 1.0


def reduce_metrics(
    parts: Iterable[Mapping[str, MetricSum]], group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Means, or maxima, over this rank's micro-batches and over the ranks of `group`.

    Every rank calls with metrics of the same names; a metric that counts nothing anywhere is 0.
    """
    totals: dict[str, tuple[list[torch.Tensor], float]] = {}
    largest_of: set[str] = set()
    for part in parts:
        for name, metric in part.items():
            if isinstance(metric, MetricMax):
                largest_of.add(name)
            values, count = totals.setdefault(name, ([], 0.0))
            values.append(metric.total)
            totals[name] = (values, count + metric.count)
    if not totals:
        return {}
    names = sorted(totals)
    parts_of = [totals[name][0] for name in names]
    flat = [value for values in parts_of for value in values]
    together = torch.stack([value if value.dtype == torch.float32 else value.double() for value in flat])
    host = together.cpu().double()  # one transfer; a GPU would take a kernel for each of the operations that follow
    sums = torch.stack([values.sum() for values in torch.split(host, [len(values) for values in parts_of])])
    counts = torch.tensor([totals[name][1] for name in names], dtype=torch.float64)
    reduced = torch.stack([sums, counts])
    if group is not None:
        reduced = all_reduce_sum(reduced.to(together.device), group).cpu()
    sums, counts = reduced
    means = torch.where(counts > 0, sums / counts.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    result: dict[str, float] = dict(zip(names, means.tolist(), strict=True))
    if largest_of:
        by_name = dict(zip(names, torch.split(host, [len(values) for values in parts_of]), strict=True))
        maxima = torch.stack([by_name[name].max() for name in sorted(largest_of)])
        maxima = all_reduce_max(maxima.to(together.device), group)
        result |= zip(sorted(largest_of), maxima.tolist(), strict=True)
    return result
