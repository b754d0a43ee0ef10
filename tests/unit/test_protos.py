"""The contracts: commented, prefixed, never renumbered, and the stubs made from them."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import field_lock
import gen_protos
import pytest
from google.protobuf import descriptor_pb2

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = gen_protos.describe()


def comments(file: descriptor_pb2.FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """Leading comment by descriptor path, e.g. (4, 0, 2, 1) for the second field of the first message."""
    return {tuple(entry.path): entry.leading_comments.strip() for entry in file.source_code_info.location}


def commented_things(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and descriptor path of whatever must have a comment."""
    for i, message in enumerate(file.message_type):
        yield message.name, (4, i)
        yield from ((f"{message.name}.{field.name}", (4, i, 2, j)) for j, field in enumerate(message.field))
    for i, enum in enumerate(file.enum_type):
        yield enum.name, (5, i)
        yield from ((value.name, (5, i, 2, j)) for j, value in enumerate(enum.value) if value.number)
    for i, service in enumerate(file.service):
        yield from ((f"{service.name}.{method.name}", (6, i, 2, j)) for j, method in enumerate(service.method))


def screaming(name: str) -> str:
    """DType -> DTYPE, SampleStatus -> SAMPLE_STATUS."""
    return "".join(
        f"_{c}" if c.isupper() and i and not name[i - 1].isupper() else c for i, c in enumerate(name)
    ).upper()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_message_field_value_and_method_is_commented(file: descriptor_pb2.FileDescriptorProto) -> None:
    written = comments(file)
    assert [name for name, path in commented_things(file) if not written[path]] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_messages_and_enums_are_not_nested(file: descriptor_pb2.FileDescriptorProto) -> None:
    """The checks on comments look at the top level only."""
    nested = [n.name for m in file.message_type for n in [*m.nested_type, *m.enum_type] if not is_map(n)]
    assert nested == []


def is_map(nested: descriptor_pb2.DescriptorProto | descriptor_pb2.EnumDescriptorProto) -> bool:
    return isinstance(nested, descriptor_pb2.DescriptorProto) and nested.options.map_entry


UNITS = {"_s": "seconds", "_ms": "milliseconds", "_ns": "nanoseconds", "_bytes": "bytes", "_tokens": "tokens"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_number_whose_name_says_a_unit_has_it_in_its_comment(file: descriptor_pb2.FileDescriptorProto) -> None:
    written = comments(file)
    lacking = []
    for i, message in enumerate(file.message_type):
        for j, field in enumerate(message.field):
            unit = next((unit for suffix, unit in UNITS.items() if field.name.endswith(suffix)), "")
            number = not field.type_name and field.type not in (field.TYPE_STRING, field.TYPE_BOOL, field.TYPE_BYTES)
            if number and unit not in written[4, i, 2, j].lower():
                lacking.append(f"{message.name}.{field.name}: {unit}")
    assert lacking == []


@pytest.mark.parametrize("enum", [e for file in FILES for e in file.enum_type], ids=lambda enum: enum.name)
def test_an_enum_begins_unspecified_and_prefixes_its_values(enum: descriptor_pb2.EnumDescriptorProto) -> None:
    prefix = {"DType": "DTYPE"}.get(enum.name, screaming(enum.name))
    assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}_UNSPECIFIED", 0)
    assert [value.name for value in enum.value if not value.name.startswith(prefix + "_")] == []


def test_no_field_number_has_changed_its_meaning() -> None:
    locked = field_lock.parse_lock(gen_protos.LOCK.read_text())
    contracts = field_lock.read_contracts(FILES)
    assert field_lock.find_breaks(locked, contracts) == []
    unlocked = [f"{owner}: {number}" for owner, number in contracts.entries if (owner, number) not in locked]
    assert unlocked == [], "run `python tools/gen_protos.py`"


def test_stubs_and_lock_are_what_the_protos_give() -> None:
    command = [sys.executable, str(ROOT / "tools" / "gen_protos.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def contracts_of(tmp_path: pathlib.Path, body: str) -> field_lock.Contracts:
    """What a .proto file with this body defines."""
    (tmp_path / "t.proto").write_text(f'syntax = "proto3";\npackage t;\n{body}\n')
    return field_lock.read_contracts(gen_protos.describe(tmp_path))


OLD = (
    "message M { string a = 1; uint64 b = 2; repeated int32 c = 3; map<string, double> d = 4; oneof k { bool e = 5; } }"
)


@pytest.mark.parametrize(
    "body",
    [
        OLD,
        OLD.replace("string a", "string new = 6; string a"),
        OLD.replace("uint64 b", "optional uint64 b"),
        OLD.replace("string a = 1;", "reserved 1;"),
        OLD.replace("string a = 1; uint64 b = 2; repeated int32 c = 3;", "reserved 1 to 3;"),
        "message Other { string a = 1; }",
    ],
)
def test_compatible_changes_are_accepted_and_old_lines_kept(tmp_path: pathlib.Path, body: str) -> None:
    locked = contracts_of(tmp_path, OLD).entries
    contracts = contracts_of(tmp_path, body)
    updated = field_lock.update_lock(locked, contracts)
    assert set(updated) == set(locked) | set(contracts.entries)
    assert field_lock.parse_lock(field_lock.format_lock(updated)) == updated
    assert field_lock.update_lock(updated, contracts) == updated


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (OLD.replace("string a = 1;", ""), "a = 1 is gone; add `reserved 1;`"),
        (OLD.replace("string a = 1", "string z = 1"), "number 1 was `string a`, is `string z`"),
        (OLD.replace("uint64 b", "int64 b"), "number 2 was `uint64 b`, is `int64 b`"),
        (OLD.replace("repeated int32 c", "int32 c"), "number 3 was `repeated int32 c`, is `int32 c`"),
        (OLD.replace("map<string, double>", "map<string, float>"), "number 4 was `map<string, double> d`"),
        (OLD.replace("oneof k { bool e = 5; }", "bool e = 5;"), "number 5 was `bool in k e`"),
    ],
)
def test_breaking_changes_are_refused(tmp_path: pathlib.Path, body: str, fault: str) -> None:
    locked = contracts_of(tmp_path, OLD).entries
    with pytest.raises(ValueError, match=re.escape(fault)):
        field_lock.update_lock(locked, contracts_of(tmp_path, body))


def test_a_reserved_number_stays_taken_when_the_reservation_is_removed(tmp_path: pathlib.Path) -> None:
    locked = contracts_of(tmp_path, OLD).entries
    reserved = field_lock.update_lock(locked, contracts_of(tmp_path, OLD.replace("string a = 1;", "reserved 1;")))
    assert "t.M.a = 1 reserved" in field_lock.format_lock(reserved)
    with pytest.raises(ValueError, match="z reuses number 1, which a had"):
        field_lock.update_lock(reserved, contracts_of(tmp_path, OLD.replace("string a = 1", "string z = 1")))


def test_a_message_that_comes_back_must_not_reuse_its_numbers(tmp_path: pathlib.Path) -> None:
    locked = field_lock.update_lock(contracts_of(tmp_path, OLD).entries, contracts_of(tmp_path, "message Other {}"))
    with pytest.raises(ValueError, match="number 1 was `string a`, is `bool x`"):
        field_lock.update_lock(locked, contracts_of(tmp_path, "message M { bool x = 1; reserved 2 to 5; }"))


def test_enum_values_are_locked_too(tmp_path: pathlib.Path) -> None:
    locked = contracts_of(tmp_path, "enum E { E_UNSPECIFIED = 0; E_A = 1; }").entries
    with pytest.raises(ValueError, match="number 1 was `value E_A`, is `value E_B`"):
        field_lock.update_lock(locked, contracts_of(tmp_path, "enum E { E_UNSPECIFIED = 0; E_B = 1; }"))


@pytest.mark.parametrize("line", ["nonsense", "a.b = x string", "a = 1 string", "a.b = 1"])
def test_a_lock_line_that_cannot_be_read_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        field_lock.parse_lock(line)
