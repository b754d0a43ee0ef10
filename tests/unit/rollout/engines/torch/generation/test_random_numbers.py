"""Random numbers by seed and token index."""

from __future__ import annotations

import numpy as np
import pytest

from miles.services.rollout.engines.torch.generation.random_numbers import philox_4x32, uniforms

# Known answers published with the Random123 library (kat_vectors, philox4x32 with 10 rounds).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox_4x32(np.array([counter], dtype=np.uint32), np.array([key], dtype=np.uint32))
    assert words[0].tolist() == list(expected)


def test_a_number_depends_on_its_own_seed_and_index_alone() -> None:
    seeds = np.array([1, 2**63 + 5, 1, 2**64 - 1], dtype=np.uint64)
    indices = np.array([0, 7, 1, 2**40], dtype=np.uint64)
    together = uniforms(seeds, indices)
    for i in range(4):
        assert uniforms(seeds[i : i + 1], indices[i : i + 1])[0] == together[i]
    assert len(set(together.tolist())) == 4


def test_numbers_are_spread_evenly_along_seeds_and_along_indices() -> None:
    count = 100_000
    ramp = np.arange(count, dtype=np.uint64)
    fixed = np.full(count, 3, dtype=np.uint64)
    for numbers in (uniforms(ramp, fixed), uniforms(fixed, ramp)):
        assert numbers.min() > 0
        assert numbers.max() < 1
        hist = np.histogram(numbers, bins=50, range=(0, 1))[0]
        chi_square = float(((hist - count / 50) ** 2 / (count / 50)).sum())
        assert chi_square < 95  # 49 degrees of freedom: beyond this once in 10 000
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.015
