"""What makes one chunk of another: steps to the changed words of two bytes, and the words. Needs no torch.

The bytes are those of a `ShardChange` (`services/trainer/changes/shard_change.py`) of elements of two bytes, whatever
the type of the tensors is. A changed bfloat16 value takes 4 bytes, a changed float32 value 8 at most.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

Data: TypeAlias = bytes | memoryview
Numbers: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"

_WORTH_IT = 0.25
"""A change larger than this part of its chunk is not sent as one: the service keeps changes beside the chunks."""
_LONGEST_STEP = 1 << 16
_ENTRY_BYTES = 4


def find_change(old: Data, new: Data) -> bytes:
    """What makes `new` of `old`; empty when they are equal, of different size, or `new` itself had better be sent."""
    if len(old) != len(new) or len(old) % 2:
        return b""
    before, after = np.frombuffer(old, np.uint16), np.frombuffer(new, np.uint16)
    positions = np.flatnonzero(before != after)
    steps = np.diff(positions, prepend=-1)
    if positions.size and int(steps.max()) > _LONGEST_STEP:
        steps = _split(steps)
        positions = np.cumsum(steps) - 1
    if positions.size * _ENTRY_BYTES > _WORTH_IT * after.nbytes:
        return b""
    return bytes(np.concatenate([(steps - 1).astype(np.uint16), after[positions]]).tobytes())


def apply_change(change: Data, old: Data) -> bytes:
    """The chunk that a change makes of `old`; ValueError when it is not a change of a chunk of this size."""
    if len(change) % _ENTRY_BYTES or len(old) % 2:
        raise ValueError(f"a change has {len(change)} bytes for a chunk of {len(old)}")
    entries, words = np.frombuffer(change, np.uint16), np.frombuffer(old, np.uint16).copy()
    count = entries.size // 2
    positions = np.cumsum(entries[:count], dtype=np.int64) + np.arange(count)
    if count and int(positions[-1]) >= words.size:
        raise ValueError(f"a change is to word {int(positions[-1])} of {words.size}")
    words[positions] = entries[count:]
    return bytes(words.tobytes())


def _split(steps: Numbers) -> Numbers:
    """The same way in steps that are short enough."""
    more = (steps - 1) // _LONGEST_STEP
    ends = np.cumsum(more + 1) - 1
    short = np.full(int(ends[-1]) + 1, _LONGEST_STEP)
    short[ends] = steps - more * _LONGEST_STEP
    return short
