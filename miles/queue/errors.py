"""Errors of the sample queue."""

from __future__ import annotations


class RedisUnsuitable(RuntimeError):
    """The server answers but cannot hold the queue without losing groups."""


class RedisRefused(RuntimeError):
    """The server refuses us, or is no Redis server; waiting does not help."""


class RedisInUse(RuntimeError):
    """Another controller holds this Redis."""


class RedisStartError(RuntimeError):
    """The bundled server did not start or did not stop."""


class QueueFull(TimeoutError):
    """Redis was out of memory until the deadline; the group is not queued."""


class MissingGroups(TimeoutError):
    """Groups that did not appear in the queue until the deadline."""

    def __init__(self, message: str, group_ids: list[int]) -> None:
        super().__init__(message)
        self.group_ids = group_ids


class UnreadableGroups(ValueError):
    """Groups whose entries could not be decoded; they are in the dead-letter stream and must be generated again."""

    def __init__(self, message: str, group_ids: list[int]) -> None:
        super().__init__(message)
        self.group_ids = group_ids
