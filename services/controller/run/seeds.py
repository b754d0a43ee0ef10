"""Seeds of responses: a function of the job's seed and the sample's place alone."""

from __future__ import annotations

import struct

import xxhash


def sample_seed(rollout_seed: int, stream: str, group_id: int, index: int) -> int:
    """A 63-bit seed for sample `index` of a group; `stream` keeps training and evaluation sets apart."""
    place = struct.pack("<qQQ", rollout_seed, group_id, index) + stream.encode()
    return int(xxhash.xxh3_64_intdigest(place)) >> 1
