"""Random numbers that depend only on (seed, token index)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ROUNDS = 10


def philox_4x32(counters: npt.NDArray[np.uint32], keys: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Philox4x32-10 of counters (n, 4) under keys (n, 2), giving (n, 4) words.

    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
    """
    c0, c1, c2, c3 = (counters[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = keys[:, 0].astype(np.uint64), keys[:, 1].astype(np.uint64)
    for round_ in range(_ROUNDS):
        r0 = (k0 + np.uint64(round_ * _WEYL[0] & 0xFFFFFFFF)) & _LOW
        r1 = (k1 + np.uint64(round_ * _WEYL[1] & 0xFFFFFFFF)) & _LOW
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ r0, p1 & _LOW, (p0 >> _32) ^ c3 ^ r1, p0 & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(seeds: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """One number in (0, 1) for each (seed, token index), both of shape (n,); 52 random bits each."""
    keys = np.stack([seeds & _LOW, seeds >> _32], axis=1).astype(np.uint32)
    zero = np.zeros_like(indices)
    counters = np.stack([indices & _LOW, indices >> _32, zero, zero], axis=1).astype(np.uint32)
    words = philox_4x32(counters, keys).astype(np.uint64)
    bits = (words[:, 0] << np.uint64(20)) | (words[:, 1] >> np.uint64(12))
    return (bits.astype(np.float64) + 0.5) * 2.0**-52
