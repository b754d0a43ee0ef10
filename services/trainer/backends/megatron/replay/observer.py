"""Which tokens Megatron-Core's routers send elsewhere than the engine did.

Forward hooks read the map of rows to experts that routers give to the layers behind them, so replayed and free routing
are measured alike, and nothing is changed. Counts stay on the device until they are asked for.

Dims: L local rows, N mixture-of-experts layers of the model, K experts a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank
from miles.services.trainer.backends.megatron.replay.engine_rows import EngineRows
from miles.services.trainer.backends.megatron.replay.router import chunk_routers


class RoutingObserver:
    """Compares the experts of this rank's chunks of one model with expected ones, in chosen forward passes."""

    def __init__(self, chunks: Sequence[Any], moe_layers: Sequence[int], parallel: ParallelRank) -> None:
        """`chunks` are bare; `moe_layers` the numbers (from 1) of the model's mixture-of-experts layers.

        Raises ValueError when there are none.
        """
        self._parallel = parallel
        self._expected: torch.Tensor | None = None
        self._current_L = torch.zeros(0, dtype=torch.bool)
        self._present_L = torch.zeros(0, dtype=torch.bool)
        self._passes = 0
        self._different: dict[tuple[int, int], torch.Tensor] = {}
        """bool [L] by pass and micro-batch: rows with other experts in any of this rank's layers."""
        self._rows = 0
        for routers in chunk_routers(chunks, moe_layers):
            for layer, router in routers:
                router.register_forward_hook(self._hook(layer))

    def begin_pass(self) -> None:
        """Begin a pass over micro-batches."""
        self._passes += 1

    def expect(self, number: int, rows: EngineRows) -> None:
        """Compare the next forward pass, of a chunk on a micro-batch of this number, with these experts until `stop`.

        Padding is not counted, and rows once, however many chunks they pass.
        """
        key = (self._passes, number)
        if key not in self._different:
            self._different[key] = torch.zeros_like(rows.present_L)
            self._rows += rows.count
        self._expected = rows.experts_LNK
        self._current_L = self._different[key]
        self._present_L = rows.present_L

    def stop(self) -> None:
        """End a chunk's forward pass, so that recomputation in a backward pass is not compared."""
        self._expected = None

    def take(self, device: torch.device) -> tuple[torch.Tensor, int]:
        """Tokens with other experts in any layer, 0-d, and all tokens of this rank since last asked.

        Collective over pipeline stages, which all get the same.
        """
        vectors = [self._different[key] for key in sorted(self._different)]
        different = torch.cat(vectors).to(torch.uint8) if vectors else torch.zeros(0, dtype=torch.uint8, device=device)
        if self._parallel.pipeline_size > 1 and len(different):
            dist.all_reduce(different, dist.ReduceOp.MAX, group=self._parallel.pipeline_group)
        rows = self._rows
        self.forget()
        return different.sum(), rows

    def forget(self) -> None:
        """Discard what was compared so far."""
        self._different.clear()
        self._passes, self._rows = 0, 0

    def _hook(self, layer: int) -> Any:
        def compare(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            if self._expected is not None:
                self._current_L |= self._present_L & differs(output[1], self._expected[:, layer].long())

        return compare


def differs(map_LE: torch.Tensor, experts_LK: torch.Tensor) -> torch.Tensor:
    """Rows that a map of rows to experts sends to others than these; bool [L]."""
    expected_LE = torch.zeros_like(map_LE, dtype=torch.bool).scatter_(1, experts_LK, value=True)
    return (map_LE.bool() != expected_LE).any(dim=1)
