"""The base class of sections, and the annotations of fields about their flags."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from miles.config.schema.faults import misspelt

_NOTHING = frozenset({"none", "null"})
"""What people write for no value. Text it would be the name of a folder, or of a column."""
_THOUSANDS = re.compile(r"(\d+)\s*([kKmM])")


@dataclasses.dataclass(frozen=True, slots=True)
class Negated:
    """This flag turns the field off; in YAML and REST the key is the field's own name."""

    flag: str


@dataclasses.dataclass(frozen=True, slots=True)
class Metavar:
    """Placeholder of the flag's value in the help text."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Derived:
    """What the value is derived from when it is not given."""

    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class Passthrough:
    """The field collects every flat key with this prefix, to be passed to an engine under its own names."""

    prefix: str


@dataclasses.dataclass(frozen=True, slots=True)
class DottedPath:
    """The field names a Python object as `package.module.name`, or by one of these aliases."""

    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class States:
    """The setting changes nothing: it states what is so anyway. That value is accepted with a note, others refused."""

    value: Any
    because: str
    """Why it is so, as a clause: "the softmax of attention is always computed in float32"."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ignored:
    """The setting changes nothing, whatever its value is: every value is accepted, with a note."""

    because: str
    """Why it is of no consequence, as a clause."""


def derived() -> Any:
    """Default of a field that `JobConfig.from_flat` derives when it is not given, so that readers never see None."""
    return Field(default=None)


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, le=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """One section of the configuration. Immutable; built by `JobConfig.from_flat`, never from nested input."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _accept_spellings(cls, value: Any, info: ValidationInfo) -> Any:
        """Convert text of the command line, and refuse likely mistakes in YAML."""
        assert info.field_name is not None
        field = cls.model_fields[info.field_name]
        kind = base_type(field)
        if kind is str and value == "" and not choices(field):
            raise misspelt("it is empty", "give one, or leave it out")
        if kind is int and isinstance(value, str):
            return _whole_number(value)
        if kind is int and isinstance(value, int) and abs(value) >= 2**63:
            raise misspelt("it must fit into 64 bits", "lower it" if value > 0 else "raise it")
        if kind is dict and isinstance(value, str):
            try:
                return json.loads(value)
            except json.JSONDecodeError as error:
                remedy = """write it in quotes, like '{"key": "value"}'"""
                raise misspelt(f"it is not JSON ({error})", remedy) from error
        if kind in (int, float) and isinstance(value, bool):
            raise ValueError("it must be a number, not a switch")
        if kind is tuple and value in ([], ()):
            return cls.model_fields[info.field_name].default  # an empty list is the same as no list
        if kind is tuple and isinstance(value, str | int) and not isinstance(value, bool):
            return (value,)
        return value


def says_nothing(field: FieldInfo, value: Any) -> bool:
    """Return whether a value leaves a setting out: no value, or the text None or null where that is no choice."""
    if value is None:
        return True
    word = value[0] if isinstance(value, list) and len(value) == 1 else value
    text = word.strip().lower() if isinstance(word, str) else ""
    return text in _NOTHING and field.default in (None, ()) and text not in choices(field)


def _whole_number(text: str) -> int | str:
    """Convert 1e3 as well as 1000 and 1_000; other text is returned as it is, to be refused."""
    if match := _THOUSANDS.fullmatch(text.strip()):
        decimal, binary = (int(match[1]) * base ** (1 + (match[2] in "mM")) for base in (1000, 1024))
        raise misspelt("it must be a whole number without a unit", f"write {decimal} or {binary}")
    try:
        number = float(text)
    except ValueError:
        return text
    if number.is_integer() and abs(number) >= 2**63:
        raise misspelt("it must fit into 64 bits", "lower it" if number > 0 else "raise it")
    return int(number) if number.is_integer() and "e" in text.lower() else text


def note(field: FieldInfo, kind: type[Any]) -> Any:
    """Return the field's annotation of this class, or None."""
    return next((item for item in field.metadata if isinstance(item, kind)), None)


def base_type(field: FieldInfo) -> type[Any]:
    """Return the field's type without None and limits: bool, int, float, str, tuple or dict."""
    annotation: Any = field.annotation
    while True:
        origin = typing.get_origin(annotation)
        if origin is Annotated:
            annotation = typing.get_args(annotation)[0]
        elif origin is typing.Literal:
            return str
        elif origin in (tuple, dict):
            return typing.cast(type[Any], origin)
        elif origin is not None:  # an Optional
            annotation = next(arg for arg in typing.get_args(annotation) if arg is not type(None))
        else:
            return typing.cast(type[Any], annotation)


def element_type(field: FieldInfo) -> type[Any]:
    """Return the element type of a tuple field: int or str."""
    annotation: Any = field.annotation
    while typing.get_origin(annotation) is not tuple:
        annotation = next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    element = typing.get_args(annotation)[0]
    if typing.get_origin(element) is Annotated:
        element = typing.get_args(element)[0]
    return typing.cast(type[Any], element)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the values that a field is limited to; empty when it is not limited."""
    annotation: Any = field.annotation
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    for arg in typing.get_args(annotation):
        if typing.get_origin(arg) is typing.Literal:
            return typing.get_args(arg)
    return ()
