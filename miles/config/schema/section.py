"""The base of every section of the configuration, and the notes a field can carry about its flag."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo


@dataclasses.dataclass(frozen=True, slots=True)
class Negated:
    """The field is switched off by this flag; the field's own name is still its key in YAML and REST."""

    flag: str


@dataclasses.dataclass(frozen=True, slots=True)
class Metavar:
    """What the flag's value looks like, for the help text."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Derived:
    """Where the value comes from when it is not given."""

    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class Passthrough:
    """The field collects every key with this prefix (in flat spelling), for a program that has flags of its own."""

    prefix: str


@dataclasses.dataclass(frozen=True, slots=True)
class DottedPath:
    """The field names a Python object as `package.module.name`, or by one of these names, which lead elsewhere."""

    aliases: tuple[str, ...] = ()


def derived() -> Any:
    """Default of a field that `JobConfig.from_flat` fills in when it is not given, so that readers never see None."""
    return Field(default=None)


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, le=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """One concern of the configuration. Immutable; built by `JobConfig.from_flat`, never from nested input."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _accept_spellings(cls, value: Any, info: ValidationInfo) -> Any:
        """Read what the command line can only say as text, and refuse what YAML can say by mistake."""
        assert info.field_name is not None
        kind = base_type(cls.model_fields[info.field_name])
        if kind is dict and isinstance(value, str):
            try:
                return json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"it is not JSON ({error})") from error
        if kind in (int, float) and isinstance(value, bool):
            raise ValueError("it must be a number, not a switch")
        if kind is tuple and value in ([], ()):
            return cls.model_fields[info.field_name].default  # an empty list and no list are the same
        if kind is tuple and isinstance(value, str | int) and not isinstance(value, bool):
            return (value,)
        return value


def note(field: FieldInfo, kind: type[Any]) -> Any:
    """The note of this class that the field carries, or None."""
    return next((item for item in field.metadata if isinstance(item, kind)), None)


def base_type(field: FieldInfo) -> type[Any]:
    """bool, int, float, str, tuple or dict: what the field holds, apart from None and limits."""
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
    """What a tuple field holds: int or str."""
    annotation: Any = field.annotation
    while typing.get_origin(annotation) is not tuple:
        annotation = next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    element = typing.get_args(annotation)[0]
    if typing.get_origin(element) is Annotated:
        element = typing.get_args(element)[0]
    return typing.cast(type[Any], element)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values a field is limited to; empty when it is not."""
    annotation: Any = field.annotation
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    for arg in typing.get_args(annotation):
        if typing.get_origin(arg) is typing.Literal:
            return typing.get_args(arg)
    return ()
