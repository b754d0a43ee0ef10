"""The flags of SGLang's server, as the version that this project drives has them."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class ServerFlag:
    """One flag of SGLang's server."""

    key: str
    """SGLang's first name of it, with underscores and without dashes in front."""
    aliases: tuple[str, ...]
    kind: str
    """switch, toggle (a switch that --no-… turns off), value, optional (a value or none) or list."""
    type: str
    """int, float, str, json, or amount (an integer that may have a unit); of each value of a list."""
    choices: tuple[str, ...]

    @property
    def is_switch(self) -> bool:
        return self.kind in ("switch", "toggle")


@functools.cache
def server_flags() -> Mapping[str, ServerFlag]:
    """Return all flags by key, in SGLang's order."""
    text = importlib.resources.files(__package__).joinpath("flags.tsv").read_text(encoding="utf-8")
    flags = (_read(row) for row in csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    return {flag.key: flag for flag in flags}


def find(name: str) -> ServerFlag | None:
    """Return the flag that SGLang takes a name for: dashes count as underscores, and the beginning of one will do."""
    wanted, names = name.replace("-", "_"), _names()
    if wanted in names:
        return names[wanted]
    begun = {flag.key: flag for each, flag in names.items() if each.startswith(wanted)}
    return next(iter(begun.values())) if len(begun) == 1 else None


@functools.cache
def _names() -> Mapping[str, ServerFlag]:
    return {name: flag for flag in server_flags().values() for name in (flag.key, *flag.aliases)}


def _read(row: Mapping[str, str]) -> ServerFlag:
    aliases = tuple(_key(name) for name in row["aliases"].split(",") if name)
    choices = tuple(choice for choice in row["choices"].split(",") if choice)
    return ServerFlag(_key(row["flag"]), aliases, row["kind"], row["type"], choices)


def _key(name: str) -> str:
    return name.replace("-", "_")
