"""The sample queue on Redis: finished groups for the trainer, half-finished ones for the rollouts that resume them,
and earlier responses for engines to draft from.

It knows nothing of training and decides nothing. Start at `groups` (`GroupQueue`).
"""

from miles.queue.client import connect, connect_async
from miles.queue.errors import (
    MissingGroups,
    QueueFull,
    RedisInUse,
    RedisRefused,
    RedisStartError,
    RedisUnsuitable,
    UnreadableGroups,
)
from miles.queue.fencing import Fenced, Holder
from miles.queue.groups import GroupQueue
from miles.queue.keys import JobKeys
from miles.queue.partial_store import PartialStore
from miles.queue.payload import Outstanding
from miles.queue.redis_lease import RedisLease
from miles.queue.response_store import ResponseStore
from miles.queue.server import RedisServer

__all__ = [
    "Fenced",
    "GroupQueue",
    "Holder",
    "JobKeys",
    "MissingGroups",
    "Outstanding",
    "PartialStore",
    "QueueFull",
    "RedisInUse",
    "RedisLease",
    "RedisRefused",
    "RedisServer",
    "RedisStartError",
    "RedisUnsuitable",
    "ResponseStore",
    "UnreadableGroups",
    "connect",
    "connect_async",
]
