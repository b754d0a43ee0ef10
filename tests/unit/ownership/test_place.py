"""Two ways to write a folder are one place."""

from __future__ import annotations

import pathlib

import pytest

from miles.ownership.place import Place, locate, locate_pattern


def test_links_dots_and_slashes_lead_to_one_place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    place = locate(tmp_path / "a" / "new")
    for other in ("a/new", "a/new/", "./a//new", "a/../a/new", "link/new", f"{tmp_path}/link/../a/new"):
        assert place.is_same(locate(other)), other


def test_a_folder_under_another_name_is_the_same_by_its_inode(tmp_path: pathlib.Path) -> None:
    inside = locate(tmp_path / "x" / "y")
    by_bind_mount = Place(pathlib.Path("/mnt/x"), ((inside.above[0][0], ("x",)),))
    assert inside.above[0] == ((tmp_path.stat().st_dev, tmp_path.stat().st_ino), ("x", "y"))
    assert inside.lies_in(by_bind_mount)
    assert not by_bind_mount.lies_in(inside)


@pytest.mark.parametrize(
    ("a", "b", "meet"),
    [
        ("one", "one", True),
        ("one", "one/two", True),
        ("one", "one-two", False),
        ("hf/{rollout_id}", "hf/{rollout_id}", True),
        ("hf/{rollout_id}", "hf/7", True),
        ("hf/{rollout_id}", "hf/7/x", True),
        ("hf/{rollout_id}", "hf", True),
        ("hf/{rollout_id}", "hf/last", False),
        ("hf/a-{rollout_id}", "hf/b-{rollout_id}", False),
        ("hf/{rollout_id:06d}", "hf/{rollout_id}", True),
        ("{rollout_id}/hf", "{rollout_id}/log", False),
    ],
)
def test_places_meet_when_one_lies_in_the_other_at_any_step(tmp_path: pathlib.Path, a: str, b: str, meet: bool) -> None:
    one, other = (locate_pattern(f"{tmp_path}/{text}") for text in (a, b))
    assert one.meets(other) == other.meets(one) == meet


@pytest.mark.parametrize(
    "text", ["{step}", "{}", "{rollout_id.real}", "{rollout_id!r}", "{rollout_id:/>9}", "{", "a\0b"]
)
def test_other_placeholders_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"placeholder|brace|null byte|'}'|format|character"):
        locate_pattern(text)
