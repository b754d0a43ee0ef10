"""Chunks of a version in the service's memory."""

from __future__ import annotations

import concurrent.futures
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rpc.gen import policy_pb2, sample_pb2, weightsync_pb2
from miles.services.weightsync.chunk_table import ChunkTable
from miles.services.weightsync.version import Refused
from miles.weights import manifest as manifests
from miles.weights.transports.grpc_chunks.changes import find_change
from miles.weights.transports.grpc_chunks.chunks import cut


def chunks_of(data: bytes, size: int, begin: int = 0) -> list[weightsync_pb2.ChunkDescriptor]:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return cut(memoryview(data), begin, size, pool)


def table(folder: pathlib.Path, nbytes: int, *others: ChunkTable, name: str = "file") -> ChunkTable:
    path = folder / name
    path.write_bytes(bytes(nbytes))
    return ChunkTable(path, nbytes, others)


def manifest(*sizes: int) -> policy_pb2.Manifest:
    descriptors, total = manifests.plan((str(i), sample_pb2.DTYPE_UINT8, (n,)) for i, n in enumerate(sizes))
    return manifests.build(policy_pb2.WeightVersion(), descriptors, total, 0)


def test_chunks_arrive_in_any_order_and_are_asked_for_once(tmp_path: pathlib.Path) -> None:
    data = bytes(range(256)) * 4
    made = table(tmp_path, len(data))
    chunks = chunks_of(data, 100)
    assert made.offer(chunks) == list(range(11))
    for chunk in reversed(chunks[3:]):
        made.put(chunk, data[chunk.offset : chunk.offset + chunk.nbytes])
    assert made.offer(chunks) == [0, 1, 2], "as after a cut"
    assert not made.covers(manifest(len(data)))
    for chunk in chunks[:3]:
        made.put(chunk, data[chunk.offset : chunk.offset + chunk.nbytes])
    assert made.covers(manifest(len(data)))
    assert list(made.listed()) == chunks
    assert b"".join(made.get(number) for number in range(11)) == data


def test_bytes_that_another_version_has_do_not_travel(tmp_path: pathlib.Path) -> None:
    data = bytes(1000) + bytes(range(200))
    old = table(tmp_path, len(data))
    chunks = chunks_of(data, 100)
    for number in old.offer(chunks):
        chunk = chunks[number]
        old.put(chunk, data[chunk.offset : chunk.offset + chunk.nbytes])
    new = table(tmp_path, len(data), old, name="new")
    changed = data[:-1] + b"!"
    assert new.offer(chunks_of(changed, 100)) == [11]


def test_a_file_that_the_trainer_wrote_itself_is_cut_when_asked(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data := bytes(range(250)) * 10)
    made = ChunkTable(path, len(data))
    assert b"".join(made.get(number) for number in range(len(made.listed()))) == data


@pytest.mark.parametrize("fault", ["beyond", "empty", "short id"])
def test_chunks_outside_of_the_buffer_are_refused(tmp_path: pathlib.Path, fault: str) -> None:
    (chunk,) = chunks_of(bytes(50), 100)
    if fault == "beyond":
        chunk.offset = 60
    elif fault == "empty":
        chunk.nbytes = 0
    else:
        chunk.id = b"short"
    with pytest.raises(Refused, match="chunk 0 lies at byte"):
        table(tmp_path, 100).offer([chunk])


def test_wrong_bytes_and_chunks_not_offered_are_refused(tmp_path: pathlib.Path) -> None:
    made = table(tmp_path, 100)
    (chunk,) = chunks_of(bytes(50), 100)
    with pytest.raises(Refused, match="was not offered"):
        made.put(chunk, bytes(50))
    made.offer([chunk])
    with pytest.raises(Refused, match="other bytes than its id says"):
        made.put(chunk, bytes(49) + b"!")
    made.close()
    with pytest.raises(Refused, match="has been freed"):
        made.put(chunk, bytes(50))


@settings(deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=6), st.integers(1, 90), st.data())
def test_a_version_is_complete_when_every_tensor_is_and_not_before(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], size: int, data: st.DataObject
) -> None:
    wanted = manifest(*sizes)
    made = table(tmp_path_factory.mktemp("table"), wanted.total_bytes)
    whole = bytes(i % 251 for i in range(wanted.total_bytes))
    chunks = chunks_of(whole, size)
    made.offer(chunks)
    left_out = data.draw(st.sets(st.integers(0, len(chunks) - 1)))
    there = set()
    for number, chunk in enumerate(chunks):
        if number not in left_out:
            made.put(chunk, whole[chunk.offset : chunk.offset + chunk.nbytes])
            there |= set(range(chunk.offset, chunk.offset + chunk.nbytes))
    needed = {i for t in wanted.tensors for i in range(t.offset, t.offset + t.nbytes)}
    assert made.covers(wanted) == (needed <= there)


def test_a_changed_chunk_is_made_of_its_base_and_goes_on_as_a_change(tmp_path: pathlib.Path) -> None:
    old_data = bytes(range(200)) * 4
    new_data = old_data[:150] + b"!" + old_data[151:]
    old, new = chunks_of(old_data, 100), chunks_of(new_data, 100)
    before = table(tmp_path, 800, name="before")
    for number in before.offer(old):
        before.put(old[number], old_data[old[number].offset :][:100])
    after = table(tmp_path, 800, before, name="after")
    assert after.offer(new) == [1]
    base_id, change = old[1].id, find_change(old_data[100:200], new_data[100:200])
    assert after.has_base(new[1], base_id)
    assert not after.has_base(new[1], bytes(16))
    assert after.put_change(new[1], base_id, change)
    assert after.covers(manifest(800))
    assert list(after.listed()) == new
    assert after.get(1) == new_data[100:200]
    assert after.change(1, base_id) == change
    assert after.change(1, bytes(16)) is None, "the engine has another chunk"
    assert after.change(0, old[0].id) is None, "nothing of it has changed"
    assert after.change(8, base_id) is None
    after.close()
    assert after.change(1, base_id) is None


def test_a_change_is_verified_and_needs_its_base(tmp_path: pathlib.Path) -> None:
    old_data, new_data = bytes(100), bytes(98) + b"ab"
    old, new = chunks_of(old_data, 100), chunks_of(new_data, 100)
    before = table(tmp_path, 100, name="before")
    before.offer(old)
    before.put(old[0], old_data)
    after = table(tmp_path, 100, before, name="after")
    after.offer(new)
    with pytest.raises(Refused, match="other bytes than its id says"):
        after.put_change(new[0], old[0].id, find_change(old_data, bytes(98) + b"xy"))
    with pytest.raises(Refused, match="does not apply"):
        after.put_change(new[0], old[0].id, b"abc")
    before.close()
    assert not after.has_base(new[0], old[0].id)
    assert not after.put_change(new[0], old[0].id, find_change(old_data, new_data)), "its base has been freed"
    assert not after.covers(manifest(100))
