"""Seeds of responses: a function of the job's seed and the sample's place alone."""

from __future__ import annotations

import struct

import xxhash

_PLACE = struct.Struct("<qQQ")


def sample_seeds(rollout_seed: int, stream: str, group_id: int, samples: int) -> list[int]:
    """A 63-bit seed for each of a group's samples; `stream` keeps training and evaluation sets apart."""
    pack, digest, name = _PLACE.pack, xxhash.xxh3_64_intdigest, stream.encode()
    return [digest(pack(rollout_seed, group_id, index) + name) >> 1 for index in range(samples)]
