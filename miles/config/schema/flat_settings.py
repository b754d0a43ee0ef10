"""A view of all settings by key, for rules that cross sections."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from miles.config.schema.section import Section


class UnusableSetting(Exception):
    """A rule asked for a setting that is itself at fault; the rule cannot say anything about it."""


class FlatSettings:
    """Every setting as an attribute. Reading one whose own value was refused raises UnusableSetting."""

    def __init__(self, values: dict[str, Any], *, given: Collection[str], invalid: Collection[str]) -> None:
        self._values = values
        self._given = frozenset(given) - frozenset(invalid)
        self._invalid = set(invalid)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_") or key not in self._values:
            raise AttributeError(f"there is no setting {key}")
        if key in self._invalid:
            raise UnusableSetting(key)
        return self._values[key]

    def given(self, key: str) -> bool:
        """Whether the user set it. Raises UnusableSetting when what he set was refused."""
        getattr(self, key)
        return key in self._given

    def is_empty(self, key: str) -> bool:
        """Whether it has no value, neither given nor filled in."""
        return self._values[key] is None

    def fill(self, key: str, value: Any) -> None:
        """Give a setting its derived value."""
        self._values[key] = value

    def refuse(self, *keys: str) -> None:
        """Mark settings as at fault, so that no later rule builds on them."""
        self._invalid.update(keys)

    def of(self, section: Section) -> dict[str, Any]:
        """The values of a section's fields."""
        return {key: self._values[key] for key in type(section).model_fields}
