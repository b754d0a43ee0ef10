"""Folders of versions on shared storage."""

from __future__ import annotations

import json
import pathlib

import pytest

from miles.services.weightsync.folders import Folder, FolderStore


def seal(folder: Folder, base: Folder | None = None) -> Folder:
    """What a trainer does, as far as the service looks at it."""
    (folder.partial / "part-0.safetensors").write_bytes(bytes(100))
    index = {"base": None if base is None else {"folder": base.path.name}}
    (folder.partial / "index.json").write_text(json.dumps(index))
    folder.partial.rename(folder.path)
    return folder


def versions(root: pathlib.Path) -> list[str]:
    return sorted(path.name for path in root.glob("*-versions/*/*"))


@pytest.fixture
def store(tmp_path: pathlib.Path) -> FolderStore:
    """One instance, whose state outlives it."""
    return FolderStore(tmp_path, "one", tmp_path / "state")


def test_what_a_version_in_use_is_based_on_stays(store: FolderStore, tmp_path: pathlib.Path) -> None:
    full = seal(store.allocate("job/policy", 0, 1, 10))
    first = seal(store.allocate("job/policy", 1, 2, 10), full)
    second = seal(store.allocate("job/policy", 2, 3, 10), first)
    store.free(full, {first.path, second.path, full.path})  # a base may be among those in use
    store.free(first, {second.path, first.path})
    assert versions(tmp_path) == ["weight_v000000", "weight_v000001", "weight_v000002"]
    assert [path.name for path in store.chain(second.path)] == ["weight_v000002", "weight_v000001", "weight_v000000"]
    again = seal(store.allocate("job/policy", 3, 4, 10))
    assert store.free(second, {again.path}) > 300
    assert versions(tmp_path) == ["weight_v000003"]


def test_a_version_given_up_leaves_nothing(store: FolderStore, tmp_path: pathlib.Path) -> None:
    folder = store.allocate("job/policy", 0, 1, 10)
    (folder.partial / "part").write_bytes(bytes(5))
    store.free(folder, set())
    assert versions(tmp_path) == []


def test_a_number_published_again_gets_a_folder_of_its_own(store: FolderStore) -> None:
    seal(store.allocate("job/policy", 4, 1, 10))
    assert store.allocate("job/policy", 4, 2, 10).path.name == "weight_v000004-2"


def test_after_a_restart_unknown_folders_go_and_bases_stay(tmp_path: pathlib.Path) -> None:
    (tmp_path / "state").mkdir()
    killed = FolderStore(tmp_path, "one", tmp_path / "state")
    full = seal(killed.allocate("job/policy", 0, 1, 10))
    first = seal(killed.allocate("job/policy", 1, 2, 10), full)
    seal(killed.allocate("job/policy", 2, 3, 10))
    killed.allocate("job/policy", 3, 4, 10)
    killed.close(remove_all=False)
    restarted = FolderStore(tmp_path, "one", tmp_path / "state")
    restarted.remove_unknown({first.path}, {first.path, full.path})
    assert versions(tmp_path) == ["weight_v000000", "weight_v000001"]
    restarted.free(first, set())
    assert versions(tmp_path) == []


def test_leftovers_of_an_instance_that_cannot_come_back_are_removed(tmp_path: pathlib.Path) -> None:
    killed = FolderStore(tmp_path, "killed", None)
    seal(killed.allocate("job/policy", 0, 1, 10))
    alive = FolderStore(tmp_path, "alive", None)
    kept = seal(alive.allocate("job/policy", 0, 1, 10))
    killed.close(remove_all=False)  # its lock is free, as after its death
    FolderStore(tmp_path, "next", None)
    assert list(tmp_path.glob("*-versions/*/*")) == [kept.path]
    alive.close(remove_all=True)
    assert not kept.path.exists()
