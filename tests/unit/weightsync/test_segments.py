"""Files for versions: room, reuse, and whose leftovers may go."""

from __future__ import annotations

import os
import pathlib
import time

import pytest

from miles.services.weightsync.segments import OutOfMemory, SegmentStore
from miles.services.weightsync.store import HoldingRecord, StateStore


def test_every_page_is_reserved(tmp_path: pathlib.Path) -> None:
    store = SegmentStore(tmp_path, "one", None)
    segment = store.allocate("job/policy", 3, 7, 10_000)
    assert segment.nbytes == 12_288
    assert segment.path.name.startswith("miles-weights-one-job_policy-")
    assert segment.path.name.endswith("-v3-7")
    stat = segment.path.stat()
    assert stat.st_size == 12_288
    assert stat.st_blocks * 512 >= 12_288
    assert stat.st_mode & 0o077 == 0, "nobody else's business"


def test_streams_whose_names_look_alike_get_different_files(tmp_path: pathlib.Path) -> None:
    store = SegmentStore(tmp_path, "one", None)
    paths = {store.allocate(stream, 0, 1, 1).path for stream in ("a/policy", "a_policy", "a/draft", "ä/policy")}
    assert len(paths) == 4
    assert {path.parent for path in paths} == {tmp_path}


@pytest.mark.parametrize(("nbytes", "reused"), [(10_000, True), (12_000, True), (4_000, False), (20_000, False)])
def test_a_spare_of_the_same_size_is_reused(tmp_path: pathlib.Path, nbytes: int, reused: bool) -> None:
    store = SegmentStore(tmp_path, "one", None)
    first = store.allocate("job", 0, 1, 10_000)
    inode = first.path.stat().st_ino
    store.free("job", first, reusable=True)
    second = store.allocate("job", 1, 2, nbytes)
    if reused:
        assert second.path.stat().st_ino == inode
    assert second.path.stat().st_size >= nbytes
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == [second.path]


def test_memory_that_may_be_mapped_is_removed(tmp_path: pathlib.Path) -> None:
    store = SegmentStore(tmp_path, "one", None)
    segment = store.allocate("job", 0, 1, 10_000)
    store.free("job", segment, reusable=False)
    assert not segment.path.exists()


def test_one_spare_is_kept_per_stream(tmp_path: pathlib.Path) -> None:
    store = SegmentStore(tmp_path, "one", None)
    segments = [store.allocate("job", number, number, 10_000) for number in range(3)]
    for segment in segments:
        store.free("job", segment, reusable=True)
    assert [segment.path.exists() for segment in segments] == [True, False, False]
    assert store.free_spare("job") == 12_288
    assert store.free_spare("job") == 0


def test_no_room_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    store = SegmentStore(tmp_path, "one", None)
    with pytest.raises(OutOfMemory, match="--directory"):
        store.allocate("job", 0, 1, 1 << 50)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_two_services_cannot_share_a_state(tmp_path: pathlib.Path) -> None:
    first = SegmentStore(tmp_path, "one", tmp_path)
    with pytest.raises(RuntimeError, match="another weightsync service"):
        SegmentStore(tmp_path, "one", tmp_path)
    first.close(remove_all=False)
    SegmentStore(tmp_path, "one", tmp_path)


@pytest.mark.parametrize(
    ("alive", "state", "removed"),
    [
        (True, "none", False),
        (True, "gone", False),
        (False, "there", False),
        (False, "none", True),
        (False, "gone", True),
    ],
)
def test_leftovers_go_when_nobody_can_come_back_for_them(
    tmp_path: pathlib.Path, alive: bool, state: str, removed: bool
) -> None:
    state_dir = {"none": None, "gone": tmp_path / "gone", "there": tmp_path}[state]
    other = SegmentStore(tmp_path, "other", state_dir)
    segment = other.allocate("job", 0, 1, 100)
    if not alive:
        other.close(remove_all=False)
    SegmentStore(tmp_path, "one", tmp_path)
    assert segment.path.exists() is not removed
    assert (tmp_path / "miles-weights-other.lock").exists() is not removed


def test_a_killed_run_that_nobody_takes_up_loses_its_memory_after_a_day(tmp_path: pathlib.Path) -> None:
    other = SegmentStore(tmp_path, "other", tmp_path)
    segment = other.allocate("job", 0, 1, 100)
    other.close(remove_all=False)
    for path in tmp_path.iterdir():
        os.utime(path, (0, time.time() - 90_000))
    SegmentStore(tmp_path, "one", tmp_path)
    assert not segment.path.exists()


def test_a_restart_removes_what_its_state_does_not_know(tmp_path: pathlib.Path) -> None:
    store = SegmentStore(tmp_path, "one", tmp_path)
    known, unknown = store.allocate("job", 0, 1, 100), store.allocate("job", 1, 2, 100)
    store.close(remove_all=False)
    store = SegmentStore(tmp_path, "one", tmp_path)
    store.remove_unknown({known.path})
    assert known.path.exists()
    assert not unknown.path.exists()


def test_closing_for_good_removes_everything(tmp_path: pathlib.Path) -> None:
    store = SegmentStore(tmp_path, "one", None)
    store.allocate("job", 0, 1, 100)
    store.close(remove_all=True)
    assert list(tmp_path.iterdir()) == []


def test_state_is_there_again_after_reopening(tmp_path: pathlib.Path) -> None:
    store = StateStore(tmp_path / "state")
    store.save_stream("job/policy", {"active": 1})
    store.save_stream("job/policy", {"active": 2})
    first = HoldingRecord("/file", 10, False, b"version 2", b"handles", b"manifest")
    second = HoldingRecord("", 0, True, b"version 3", b"others", None)
    store.save_holding("job/policy", 3, second)
    store.save_holding("job/policy", 2, first)
    instance = store.instance
    reopened = StateStore(tmp_path / "state")
    assert reopened.instance == instance
    assert reopened.streams() == {"job/policy": {"active": 2}}
    assert reopened.holdings("job/policy") == [(2, first), (3, second)]
    reopened.delete_holding("job/policy", 2)
    assert reopened.holdings("job/policy") == [(3, second)]
    reopened.delete_stream("job/policy")
    assert (reopened.streams(), reopened.holdings("job/policy")) == ({}, [])


def test_instances_without_a_state_folder_have_names_of_their_own() -> None:
    assert StateStore(None).instance != StateStore(None).instance
