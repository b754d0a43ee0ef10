from __future__ import annotations

import pytest

from miles.queue.blobs import PIECE_BYTES, blob_name, content_hash, is_named, piece_keys, pieces


def test_the_content_hash_is_xxh3_128() -> None:
    assert content_hash(b"") == "99aa06d3014798d86001c324468d497f"


@pytest.mark.parametrize(
    ("nbytes", "count"),
    [(1, 1), (PIECE_BYTES, 1), (PIECE_BYTES + 1, 2), (2 * PIECE_BYTES, 2), (2 * PIECE_BYTES + 1, 3)],
)
def test_a_payload_is_the_pieces_under_its_keys(nbytes: int, count: int) -> None:
    payload = bytes(range(256)) * (nbytes // 256) + b"?" * (nbytes % 256)
    name = blob_name(payload)
    keys = piece_keys("p:", name)
    parts = pieces(payload, len(keys))
    assert len(keys) == len(set(keys)) == len(parts) == count
    assert keys[0] == f"p:{name}"
    assert b"".join(parts) == payload
    assert max(map(len, parts)) <= PIECE_BYTES
    assert is_named(name, memoryview(payload))
    assert not is_named(name, memoryview(payload[:-1]))
