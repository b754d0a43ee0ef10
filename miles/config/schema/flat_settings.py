"""All settings by key, in one namespace over the sections, for derivation and rules."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from miles.config.schema.section import Section


class InvalidSetting(Exception):
    """A rule read a setting whose value is invalid, so that the rule cannot be applied."""


class FlatSettings:
    """Every setting as an attribute. Reading an invalid one raises InvalidSetting."""

    def __init__(self, values: dict[str, Any], *, given: Collection[str], invalid: Collection[str]) -> None:
        self._values = values
        self._given = frozenset(given) - frozenset(invalid)
        self._invalid = set(invalid)
        self.replaced: dict[str, tuple[Any, str]] = {}
        """Values that were given and are others now, each with why."""

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_") or key not in self._values:
            raise AttributeError(f"there is no setting {key}")
        if key in self._invalid:
            raise InvalidSetting(key)
        return self._values[key]

    def given(self, key: str) -> bool:
        """Return whether the user set it. Raises InvalidSetting when the value is invalid."""
        getattr(self, key)
        return key in self._given

    def is_valid(self, key: str) -> bool:
        """Return whether it may be read."""
        return key not in self._invalid

    def is_empty(self, key: str) -> bool:
        """Return whether it has no value, neither given nor derived."""
        return self._values[key] is None

    def fill(self, key: str, value: Any) -> None:
        """Set a derived value."""
        self._values[key] = value

    def replace(self, key: str, value: Any, why: str) -> None:
        """Set a value in place of the one that was given, and say why."""
        self.replaced[key] = (self._values[key], why)
        self._values[key] = value

    def refuse(self, *keys: str) -> None:
        """Mark settings as invalid, so that no later rule uses them."""
        self._invalid.update(keys)

    def changed(self, **values: Any) -> FlatSettings:
        """Return these settings with others in their place; nothing is derived or checked."""
        return FlatSettings(self._values | values, given=self._given | values.keys(), invalid=self._invalid)

    def of(self, section: Section) -> dict[str, Any]:
        """Return the values of a section's fields."""
        return {key: self._values[key] for key in type(section).model_fields}
