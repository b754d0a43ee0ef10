"""Decides which worker gets the next group: the one that runs the fewest, if it has room. Pure."""

from __future__ import annotations

import heapq


class LoadBalance:
    """How many groups each worker runs, of how many it can usefully run at once.

    Finding the least loaded worker takes O(log workers): a heap of (groups, worker), in which outdated entries are
    skipped.
    """

    def __init__(self) -> None:
        self._groups: dict[str, int] = {}
        self._capacity: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []
        self._in_heap: set[tuple[int, str]] = set()

    def set_capacity(self, worker_id: str, capacity: int) -> None:
        """Set how many groups a worker can run at once; 0 while it can run none."""
        self._capacity[worker_id] = capacity
        self._groups.setdefault(worker_id, 0)
        self._offer(worker_id)

    def remove_worker(self, worker_id: str) -> None:
        """Forget a worker that is disconnected."""
        self._capacity.pop(worker_id, None)
        self._groups.pop(worker_id, None)

    def next(self) -> str | None:
        """Return the worker with room that runs the fewest groups, by name among equals; None when none has room."""
        while self._heap:
            groups, worker_id = self._heap[0]
            if groups == self._groups.get(worker_id) and groups < self._capacity[worker_id]:
                return worker_id
            self._in_heap.remove(heapq.heappop(self._heap))
        return None

    def groups_of(self, worker_id: str) -> int:
        """Return how many groups a worker runs."""
        return self._groups.get(worker_id, 0)

    def add_group(self, worker_id: str) -> None:
        """Count a group that a worker got."""
        self._groups[worker_id] += 1
        self._offer(worker_id)

    def remove_group(self, worker_id: str) -> None:
        """Count a group that a worker finished or returned; does nothing for a forgotten worker."""
        if worker_id in self._groups:
            self._groups[worker_id] -= 1
            self._offer(worker_id)

    def _offer(self, worker_id: str) -> None:
        entry = (self._groups[worker_id], worker_id)
        if entry[0] < self._capacity.get(worker_id, 0) and entry not in self._in_heap:
            heapq.heappush(self._heap, entry)
            self._in_heap.add(entry)
