"""Which worker gets the next group: the one that holds the fewest, as long as it has room. Pure."""

from __future__ import annotations

import heapq


class LoadBalance:
    """Workers by how many groups they hold, of how many they can usefully hold.

    Finding the least loaded one takes O(log workers): a heap of (held, worker), in which entries that are out of date
    are skipped.
    """

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._capacity: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []
        self._in_heap: set[tuple[int, str]] = set()

    def set_capacity(self, worker_id: str, capacity: int) -> None:
        """A worker has said how many groups it can hold; 0 while it can take none."""
        self._capacity[worker_id] = capacity
        self._held.setdefault(worker_id, 0)
        self._offer(worker_id)

    def remove(self, worker_id: str) -> None:
        """A worker is gone."""
        self._capacity.pop(worker_id, None)
        self._held.pop(worker_id, None)

    def next(self) -> str | None:
        """The worker with room that holds the fewest groups, by name among equals; None when nobody has room."""
        while self._heap:
            held, worker_id = self._heap[0]
            if held == self._held.get(worker_id) and held < self._capacity[worker_id]:
                return worker_id
            self._in_heap.remove(heapq.heappop(self._heap))
        return None

    def held(self, worker_id: str) -> int:
        """How many groups a worker holds."""
        return self._held.get(worker_id, 0)

    def take(self, worker_id: str) -> None:
        """A worker got a group."""
        self._held[worker_id] += 1
        self._offer(worker_id)

    def give(self, worker_id: str) -> None:
        """A worker holds one group less; does nothing for one that is gone."""
        if worker_id in self._held:
            self._held[worker_id] -= 1
            self._offer(worker_id)

    def _offer(self, worker_id: str) -> None:
        entry = (self._held[worker_id], worker_id)
        if entry[0] < self._capacity.get(worker_id, 0) and entry not in self._in_heap:
            heapq.heappush(self._heap, entry)
            self._in_heap.add(entry)
