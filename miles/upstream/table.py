"""Reads the table of upstream flags."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class UpstreamFlag:
    """One flag of miles or slime, a key of their files (without dashes), or all with a beginning (`--router-*`)."""

    flag: str
    type: str
    default: str
    choices: tuple[str, ...]
    group: str
    taken: str
    """Empty for a setting; else `no effect` or `refused`."""
    reason: str
    """Why, as a clause."""
    remedy: str

    @property
    def is_switch(self) -> bool:
        return self.type.startswith(("flag", "bool"))


@functools.cache
def upstream_flags() -> Sequence[UpstreamFlag]:
    """Return the rows of the table in its order. A flag of two backends has two."""
    text = importlib.resources.files(__package__).joinpath("flags.tsv").read_text(encoding="utf-8")
    rows: Iterator[dict[str, Any]] = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [UpstreamFlag(**row | {"choices": tuple(filter(None, row["choices"].split(",")))}) for row in rows]


def find(name: str) -> UpstreamFlag | None:
    """Return the row of a flag or key that is no setting here, however its dashes are written, or None."""
    key = _key(name)
    if (row := _by_key().get(key)) is not None:
        return row
    if (row := _by_key().get(key.removeprefix("no_"))) is not None and row.type == "bool(+--no-)":
        return row
    starts = ((start, row) for start, row in _by_start().items() if key.startswith(start))
    return max(starts, key=lambda item: len(item[0]), default=(None, None))[1]


@functools.cache
def _by_key() -> Mapping[str, UpstreamFlag]:
    return {_key(row.flag): row for row in upstream_flags() if row.taken and not row.flag.endswith("*")}


@functools.cache
def _by_start() -> Mapping[str, UpstreamFlag]:
    return {_key(row.flag[:-1]): row for row in upstream_flags() if row.taken and row.flag.endswith("*")}


def _key(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")
