"""The export to rank 0 that gathers only parameters of which some rank's part has changed.

megatron-bridge gathers a parameter from any layout in one go, and it alone knows where the elements lie afterwards.
So the ranks compare what they hold of each parameter and agree which ones to gather; rank 0 has the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from miles.services.trainer.changes.kept_shards import KeptShards, Shard
from miles.weights.naming.conversion import Named

Gather = Callable[[Iterable[Any]], Iterator[Named]]
"""As `Exporter.gathered`."""


class ChangedParameters:
    """What one rank keeps from one export to the next."""

    def __init__(self) -> None:
        self._kept = KeptShards()
        self._names: dict[int, list[str]] = {}
        """Tensors that each task yields, by its position."""
        self._full: dict[str, torch.Tensor] = {}
        """Rank 0: the last export. Its tensors are never written to, because transports may keep them too."""
        self._is_whole = False
        """Whether that one came to its end on this rank."""
        self.gathered_bytes = 0
        """Bytes of the tensors that were gathered for the last export."""

    def export(self, tasks: Sequence[Any], gather: Gather) -> Iterator[Named]:
        """On rank 0, what `gather` yields of all tasks, in host memory; collective. Nobody may write to it.

        `tasks` are megatron-bridge's, the same in every call.
        """
        chosen = self._agree(tasks)
        self._is_whole = False  # until the end, which an error may prevent
        self.gathered_bytes = 0
        at = done = -1

        def taken() -> Iterator[Any]:
            nonlocal at
            for at in chosen:
                self._names[at] = []
                yield tasks[at]

        for name, tensor in gather(taken()):
            yield from self._kept_of(range(done + 1, at))
            done = at
            self._names[at].append(name)
            self.gathered_bytes += tensor.nbytes
            if dist.get_rank() == 0:
                full = torch.empty(tensor.shape, dtype=tensor.dtype)
                self._full[name] = full.copy_(tensor)
                yield name, full
        yield from self._kept_of(range(done + 1, len(tasks)))
        self._is_whole = True

    def _agree(self, tasks: Sequence[Any]) -> list[int]:
        """Positions of the tasks to carry out, the same on every rank; keeps the parameters as they are now."""
        flags = torch.zeros(len(tasks) + 1, dtype=torch.int32)
        flags[-1] = not self._is_whole
        for position, task in enumerate(tasks):
            if task is not None:
                flags[position] = self._has_changed(str(position), task)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        everything = bool(flags[-1])
        return [position for position in range(len(tasks)) if everything or flags[position]]

    def _has_changed(self, key: str, task: Any) -> bool:
        if getattr(task.mapping, "is_grouped_export", False):
            return True  # megatron-bridge collects several of these before it yields anything
        held = task.param_weight
        if held is None:
            return False  # another pipeline stage's
        if type(held) not in (torch.Tensor, torch.nn.Parameter):
            return True  # quantised or distributed, in a representation of its own
        return self._kept.has_changed(Shard(key, tuple(held.shape), 0, held.detach().reshape(-1)))

    def _kept_of(self, positions: Iterable[int]) -> Iterator[Named]:
        """Rank 0: what the tasks at these positions gave when they were carried out last."""
        if dist.get_rank() == 0:
            for position in positions:
                for name in self._names.get(position, ()):
                    yield name, self._full[name]
