"""Registries of algorithms by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A table by name that refuses duplicates, and lists the names when a look-up fails."""

    def __init__(self, kind: str) -> None:
        """`kind` names the entries in messages."""
        self._kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Register; raises ValueError when the name is taken."""
        if name in self._entries:
            raise ValueError(f"{self._kind} {name!r} is already registered; choose another name")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        """Look up; raises KeyError with the nearest name and all names."""
        if name in self._entries:
            return self._entries[name]
        nearest = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise KeyError(f"no {self._kind} {name!r}{hint} Registered: {', '.join(sorted(self._entries))}")

    def __contains__(self, name: str) -> bool:
        """Whether the name is registered."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Names in the order of registration."""
        return iter(self._entries)
