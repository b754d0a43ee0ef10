"""Fences: results under a worker lease that has ended are refused, in the same atomic change that would store them.

The controller sets a worker's fence when its lease ends (`services/controller/run/set_fences.py`). `PUT` and `DROP` in
`scripts` ask `IS_FENCED` first.
"""

from __future__ import annotations

import dataclasses

IS_FENCED = """
local function fenced(fences, worker, number)
  if number == '' then return false end
  local own, all = redis.call('HGET', fences, worker) or 0, redis.call('HGET', fences, '*') or 0
  return tonumber(number) < math.max(tonumber(own), tonumber(all))
end
"""
"""Lua function: whether a lease number is smaller than the fence of its worker or of all workers."""

FENCE = """
-- KEYS fences ; ARGV worker_id, lease_number, ...
redis.call('HDEL', KEYS[1], '')
for i = 1, #ARGV, 2 do
  local before = tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or 0)
  if tonumber(ARGV[i + 1]) > before then redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
return 1
"""
"""Refuse results of each worker's leases with smaller numbers from now on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a group lease: a worker, with the number of its own lease at the controller."""

    worker_id: str
    lease_number: int


class Fenced(RuntimeError):
    """The worker lease under which a result was sent has ended; the work goes to another worker."""

    def __init__(self, group_id: int, holder: Holder | None) -> None:
        assert holder is not None, "only a holder's results are fenced"
        lease = f"lease {holder.lease_number} of {holder.worker_id}"
        super().__init__(f"group {group_id}: {lease} is over; its results are refused")


def stamp(holder: Holder | None) -> tuple[str, int | str]:
    """Worker and lease number as arguments of a script; empty strings are never fenced."""
    return ("", "") if holder is None else (holder.worker_id, holder.lease_number)
