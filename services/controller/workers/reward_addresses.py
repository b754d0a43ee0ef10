"""Decides which reward services each rollout calls."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping

from miles.reward_names import DEFAULT_SERVICE


@dataclasses.dataclass(frozen=True, slots=True)
class RewardAddresses:
    """Addresses by name, and those of the built-in workers, over which rollouts are spread."""

    named: Mapping[str, str]
    """The user's own: host:port by name."""
    builtin: tuple[str, ...] = ()
    """Workers that serve as the default, in order; empty when the user named one."""

    def of(self, worker_id: str) -> dict[str, str]:
        """Return one rollout's addresses by name: always the same, so that it need not load its job again."""
        if not self.builtin:
            return dict(self.named)
        number = re.search(r"\d+$", worker_id)
        position = int(number[0]) if number else zlib.crc32(worker_id.encode())
        return {DEFAULT_SERVICE: self.builtin[position % len(self.builtin)], **self.named}
