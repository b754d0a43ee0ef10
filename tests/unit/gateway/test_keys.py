"""API keys: hashed at rest, scopes that include each other, revocation that counts at once."""

from __future__ import annotations

import json
import os
import pathlib
import threading

import pytest

from miles.gateway import keys_command
from miles.gateway.keys import KeyFile, KeyFileError, Scope


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "keys.json"


def test_a_key_is_known_by_its_text_and_stored_as_a_hash(path: pathlib.Path) -> None:
    keys = KeyFile(path)
    key, text = keys.create("alice", Scope.SUBMIT)
    assert keys.verify(text) == key
    stored = path.read_text()
    secret = text.split("_", 2)[2]
    assert text not in stored
    assert secret not in stored
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("change", [str.upper, lambda text: text[:-1], lambda text: text + "a", lambda text: ""])
def test_no_other_text_is_the_key(path: pathlib.Path, change: object) -> None:
    keys = KeyFile(path)
    _, text = keys.create("alice", Scope.READ)
    assert keys.verify(change(text)) is None  # type: ignore[operator]


def test_the_id_of_one_key_with_the_secret_of_another_is_no_key(path: pathlib.Path) -> None:
    keys = KeyFile(path)
    first, _ = keys.create("a", Scope.READ)
    _, second = keys.create("b", Scope.ADMIN)
    mixed = f"mk_{first.key_id}_{second.split('_', 2)[2]}"
    assert keys.verify(mixed) is None


def test_a_revoked_key_is_refused_by_other_readers(path: pathlib.Path) -> None:
    _, text = KeyFile(path).create("alice", Scope.READ)
    reader = KeyFile(path)
    assert reader.verify(text) is not None
    KeyFile(path).revoke("alice")
    reader._looked_s = float("-inf")  # a second later
    assert reader.verify(text) is None


def test_an_expired_key_is_refused(path: pathlib.Path) -> None:
    keys = KeyFile(path)
    _, text = keys.create("alice", Scope.READ, lifetime_s=-1)
    assert keys.verify(text) is None


def test_names_are_unique_and_plain(path: pathlib.Path) -> None:
    keys = KeyFile(path)
    keys.create("alice", Scope.READ)
    with pytest.raises(ValueError, match="there is a key named 'alice'"):
        keys.create("alice", Scope.READ)
    with pytest.raises(ValueError, match="must be letters"):
        keys.create("a b", Scope.READ)


def test_keys_made_at_the_same_time_are_all_kept(path: pathlib.Path) -> None:
    makers = [threading.Thread(target=KeyFile(path).create, args=(f"k{i}", Scope.READ)) for i in range(8)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert {key.name for key in KeyFile(path).list()} == {f"k{i}" for i in range(8)}


@pytest.mark.parametrize(
    "content", ["", "[]", '{"keys": [{}]}', '{"keys": [{"id": "a", "name": "b", "scope": "root"}]}']
)
def test_a_broken_file_is_named(path: pathlib.Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(KeyFileError, match=r"keys\.json is not a file of keys"):
        KeyFile(path).list()


def test_no_key_is_valid_while_the_file_cannot_be_read(path: pathlib.Path) -> None:
    _, text = KeyFile(path).create("alice", Scope.READ)
    reader = KeyFile(path)
    assert reader.verify(text) is not None
    whole = path.read_text()
    for content in (whole[: len(whole) // 2], whole):
        path.write_text(content)
        reader._looked_s = float("-inf")  # a second later
        assert (reader.verify(text) is not None) == (content == whole)
        assert (reader.verify(text) is not None) == (content == whole)


def test_scopes_include_each_other() -> None:
    assert [[a.includes(b) for b in Scope] for a in Scope] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_the_command_makes_lists_and_revokes(path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ["--keys-file", str(path), "--json"]
    assert keys_command.main(["create", "alice", "--scope", "admin", *file]) == 0
    made = json.loads(capsys.readouterr().out)
    assert KeyFile(path).verify(made["key"]) is not None
    assert keys_command.main(["list", *file]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(key["name"], key["scope"]) for key in listed] == [("alice", "admin")]
    assert "key" not in listed[0]
    assert keys_command.main(["revoke", "alice", *file]) == 0
    assert keys_command.main(["revoke", "alice", *file]) == 2
    assert "no key is named 'alice'" in capsys.readouterr().err
    assert not any(name.endswith(".tmp") for name in os.listdir(path.parent))
