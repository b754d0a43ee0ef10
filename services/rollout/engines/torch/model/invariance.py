"""Batch invariance: the cheapest padding with which this machine computes a row the same way beside any other rows.

A response must not depend on the requests that happen to run beside it, and a key recomputed with a whole prompt must
equal the one computed token by token. Both follow if each row of a matmul is independent of the other rows and of
their number. Matrix libraries choose kernels by shape, so on CPUs that holds from some number of rows on, and on GPUs
often only for one number of rows. The engine tries both at start-up, on shapes like the model's: pad up to 16 rows if
that is enough, else pad every forward pass to the same number.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence

import torch

from miles.services.rollout.engines.torch.model.architecture import ModelShape
from miles.services.rollout.engines.torch.model.kv_cache import round_up

logger = logging.getLogger(__name__)

RowFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

MIN_ROWS = 16
_QUERY_CANDIDATES = (1, 4, 8, 16)
_QUERIES = (*range(1, 21), 24, 31, 32, 40)
_ROWS = (16, 17, 23, 31, 32, 48, 63, 64, 100, 128, 200, 256, 300)
_EXTRA_ROWS = {"cpu": 64, "cuda": 256}
"""Prompt tokens of a step beside all decoding requests, where every step has the same number of rows; and drafts."""

_VECTOR = 32
"""Numbers that elementwise functions of a CPU take at once, at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class RowPadding:
    """Rows a forward pass is padded to: at least `rows`, or exactly."""

    rows: int = MIN_ROWS
    exact: bool = False
    multiple: int = 1
    """What the number of rows is rounded up to a multiple of."""

    def missing(self, count: int) -> int:
        """Rows to add to `count`; raises ValueError when they are too many already."""
        if self.exact and count > self.rows:
            raise ValueError(f"{count} rows in a step that is padded to exactly {self.rows}")
        return round_up(max(self.rows, count), self.multiple) - count


@dataclasses.dataclass(frozen=True, slots=True)
class Padding:
    """How a generator pads."""

    tokens: RowPadding
    """Tokens that go through the model in one step."""
    logits: RowPadding
    """Rows that go through its head."""
    queries: int
    """Query rows an attention matmul has at least."""
    max_prefill_tokens: int
    """Prompt tokens in one step."""
    max_draft_tokens: int = 0
    """Drafts in one step; they take nothing from the prompts."""


def choose_padding(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    max_running_requests: int,
    max_prefill_tokens: int,
    max_drafts: int = 0,
    linear: RowFunction = torch.nn.functional.linear,
) -> Padding:
    """The cheapest padding that keeps rows independent here; logs a warning when none of them does.

    `max_drafts`: drafts of a request in one step.
    """
    max_draft_tokens = max_running_requests * max_drafts
    queries = min_query_rows(shape, dtype, device)
    faults = [] if queries is not None else ["attention"]
    # A CPU rounds the last few numbers of a tensor, which fill no vector, otherwise: of a router's sigmoid, say.
    tokens = RowPadding(multiple=_VECTOR // math.gcd(_VECTOR, shape.experts) if shape.experts else 1)
    logits = RowPadding()
    if dependent_shapes(shape, dtype, device, _ROWS, linear):
        extra = min(max_prefill_tokens, _EXTRA_ROWS.get(device.type, 64))
        max_prefill_tokens = extra
        max_draft_tokens = min(max_draft_tokens, max(_EXTRA_ROWS.get(device.type, 64), max_drafts))
        drawing = max_running_requests + max_draft_tokens
        tokens = RowPadding(round_up(drawing + extra, MIN_ROWS), exact=True)
        logits = RowPadding(round_up(drawing, MIN_ROWS), exact=True)
        faults += dependent_shapes(shape, dtype, device, (tokens.rows,), linear)
        if shape.experts:
            faults.append("experts")
        logger.info("every step is padded to %d tokens and %d rows of logits", tokens.rows, logits.rows)
    if faults:
        logger.warning(
            "%s on %s computes a row differently beside different rows (%s): responses may depend on the requests "
            "beside them, and a seed may not reproduce",
            dtype,
            device,
            ", ".join(faults),
        )
    return Padding(tokens, logits, queries or MIN_ROWS, max_prefill_tokens, max_draft_tokens)


def min_query_rows(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> int | None:
    """The fewest query rows from which attention treats a row the same at any number of rows; None if 16 do not."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    batch, most, length, written = 24, 96, 448, 190
    query_BMD, keys_BDT, values_BTD = (
        random(batch, most, shape.head_dim),
        random(batch, shape.head_dim, length),
        random(batch, length, shape.value_dim),
    )
    mask_T = torch.zeros(length, dtype=dtype, device=device)
    mask_T[written:] = -torch.inf

    def attend(slots: int, rows: int, positions: int) -> torch.Tensor:
        scores = torch.matmul(query_BMD[:slots, :rows], keys_BDT[:slots, :, :positions])
        weights = torch.add(mask_T[:positions], scores, alpha=0.1).softmax(-1)
        return torch.matmul(weights, values_BTD[:slots, :positions])

    reference = attend(batch, most, length)

    def independent(rows: int) -> bool:
        return all(
            torch.equal(attend(slots, rows, positions), reference[:slots, :rows])
            for positions in (192, 384, 448)
            for slots in (1, 7, batch)
        )

    good = {rows for rows in _QUERIES if independent(rows)}
    for candidate in _QUERY_CANDIDATES:
        if all(rows in good for rows in _QUERIES if rows >= candidate):
            return candidate
    return None


def dependent_shapes(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    counts: Sequence[int],
    linear: RowFunction = torch.nn.functional.linear,
) -> list[str]:
    """Layers, as "inputs x outputs" or a name, in which a row depends on the others at one of these numbers of rows.

    Compares each number of rows with the largest, and each with itself after the rows have changed places.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = {
        (shape.hidden_size, shape.heads * shape.head_dim),
        (shape.hidden_size, shape.kv_heads * shape.head_dim),
        (shape.heads * shape.value_dim, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
        (shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, min(shape.vocabulary, 4096)),
    }
    layers: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
        "activation": (shape.intermediate_size, torch.nn.functional.silu),
        "softmax": (min(shape.vocabulary, 4096), lambda rows_MI: rows_MI.float().log_softmax(-1)),
    }
    for inputs, outputs in sorted(sizes):
        weight_OI = torch.randn(outputs, inputs, generator=generator).to(device, dtype)
        layers[f"{inputs} x {outputs}"] = (inputs, functools.partial(_apply, linear, weight_OI))
    faults = []
    for name, (inputs, layer) in layers.items():
        rows_MI = torch.randn(max(counts), inputs, generator=generator).to(device, dtype)
        if not _rows_independent(layer, rows_MI, counts):
            faults.append(name)
    return faults


def _apply(linear: RowFunction, weight_OI: torch.Tensor, rows_MI: torch.Tensor) -> torch.Tensor:
    return linear(rows_MI, weight_OI)


def _rows_independent(
    layer: Callable[[torch.Tensor], torch.Tensor], rows_MI: torch.Tensor, counts: Sequence[int]
) -> bool:
    reference = layer(rows_MI)
    for count in counts:
        output = layer(rows_MI[:count])
        moved = layer(rows_MI[:count].roll(count // 3, 0)).roll(-(count // 3), 0)
        if not torch.equal(output, reference[:count]) or not torch.equal(moved, output):
            return False
    return True
