"""The numbers that fields and enum values have had, so that none is ever given a second meaning.

protos/fields.lock holds one line for each field and enum value that ever was: `full.name = number type`. A field may
only go away by being `reserved`; its line then ends in `reserved` and stays. Lines of a message that is gone stay too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from google.protobuf import descriptor_pb2

Field = descriptor_pb2.FieldDescriptorProto
HEADER = "# Every field and enum value there ever was. Written by tools/gen_protos.py; never edit or remove a line.\n"
RESERVED = "reserved"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A field or an enum value; `kind` is its type as .proto spells it, "value" for an enum value, or "reserved"."""

    owner: str
    name: str
    number: int
    kind: str


@dataclasses.dataclass
class Contracts:
    """What a set of .proto files defines."""

    entries: dict[tuple[str, int], Entry] = dataclasses.field(default_factory=dict)
    reserved: dict[str, list[range]] = dataclasses.field(default_factory=dict)
    """Reserved numbers by message or enum; a key for each one there is."""

    def is_reserved(self, owner: str, number: int) -> bool:
        """True when the message or enum reserves this number."""
        return any(number in numbers for numbers in self.reserved.get(owner, []))


def read_contracts(files: Iterable[descriptor_pb2.FileDescriptorProto]) -> Contracts:
    """Collect the fields, enum values and reserved numbers of all messages and enums, nested ones too."""
    contracts = Contracts()
    for file in files:
        for enum in file.enum_type:
            _read_enum(contracts, f"{file.package}.{enum.name}", enum)
        for message in file.message_type:
            _read_message(contracts, f"{file.package}.{message.name}", message)
    return contracts


def parse_lock(text: str) -> dict[tuple[str, int], Entry]:
    """Read the lock file; ValueError for a line it does not understand."""
    entries = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        path, separator, rest = line.partition(" = ")
        number, _, kind = rest.partition(" ")
        owner, _, name = path.rpartition(".")
        if not (separator and owner and name and kind and number.removeprefix("-").isdigit()):
            raise ValueError(f"fields.lock: cannot read {line!r}; expected `full.name = number type`")
        entries[owner, int(number)] = Entry(owner, name, int(number), kind)
    return entries


def format_lock(entries: dict[tuple[str, int], Entry]) -> str:
    """Write the lock file, ordered by owner and number."""
    lines = [f"{e.owner}.{e.name} = {e.number} {e.kind}\n" for _, e in sorted(entries.items())]
    return HEADER + "".join(lines)


def find_breaks(locked: dict[tuple[str, int], Entry], contracts: Contracts) -> list[str]:
    """What the contracts do that readers or writers of older messages would misread; empty when nothing."""
    breaks = []
    for (owner, number), old in locked.items():
        if owner not in contracts.reserved:
            continue
        new = contracts.entries.get((owner, number))
        if new is None and not contracts.is_reserved(owner, number):
            breaks.append(f"{owner}: {old.name} = {number} is gone; add `reserved {number};`")
        elif new is not None and old.kind == RESERVED:
            breaks.append(f"{owner}: {new.name} reuses number {number}, which {old.name} had; give it a new number")
        elif new is not None and (new.name, _wire_kind(new)) != (old.name, _wire_kind(old)):
            breaks.append(
                f"{owner}: number {number} was `{old.kind} {old.name}`, is `{new.kind} {new.name}`; "
                f"give the new one a new number and add `reserved {number};`"
            )
    return breaks


def update_lock(locked: dict[tuple[str, int], Entry], contracts: Contracts) -> dict[tuple[str, int], Entry]:
    """The lock with new entries added and vanished ones marked reserved; ValueError when something breaks."""
    if breaks := find_breaks(locked, contracts):
        raise ValueError("\n".join(breaks))
    updated = dict(locked)
    for key, old in locked.items():
        if key[0] in contracts.reserved and key not in contracts.entries:
            updated[key] = dataclasses.replace(old, kind=RESERVED)
    return updated | contracts.entries


def _wire_kind(entry: Entry) -> str:
    """What bytes depend on: `optional` changes what absence means, not how a value is written."""
    return entry.kind.removeprefix("optional ")


def _read_message(contracts: Contracts, path: str, message: descriptor_pb2.DescriptorProto) -> None:
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    contracts.reserved[path] = [range(r.start, r.end) for r in message.reserved_range]
    for field in message.field:
        kind = _kind(field, maps)
        if field.HasField("oneof_index") and not field.proto3_optional:
            kind += f" in {message.oneof_decl[field.oneof_index].name}"
        contracts.entries[path, field.number] = Entry(path, field.name, field.number, kind)
    for nested in message.nested_type:
        if not nested.options.map_entry:
            _read_message(contracts, f"{path}.{nested.name}", nested)
    for enum in message.enum_type:
        _read_enum(contracts, f"{path}.{enum.name}", enum)


def _read_enum(contracts: Contracts, path: str, enum: descriptor_pb2.EnumDescriptorProto) -> None:
    contracts.reserved[path] = [range(r.start, r.end + 1) for r in enum.reserved_range]
    for value in enum.value:
        contracts.entries[path, value.number] = Entry(path, value.name, value.number, "value")


def _kind(field: Any, maps: dict[str, Any]) -> str:
    name = field.type_name.removeprefix(".") or Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label != Field.LABEL_REPEATED:
        return f"optional {name}" if field.proto3_optional else name
    if entry := maps.get(field.type_name.rpartition(".")[2]):
        key, value = (_kind(part, {}) for part in entry.field)
        return f"map<{key}, {value}>"
    return f"repeated {name}"
