"""Reads the fields of a prompt from a row of a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from miles.answers.quantities import plain_decimal
from miles.data.errors import DataError
from miles.types import Message, Prompt

_MAX_EXPONENT = 400
"""Of ten, in a label that is a number; 64-bit floats end at 308."""


@dataclasses.dataclass(frozen=True, slots=True)
class PromptFields:
    """The columns of a prompt's fields."""

    input_key: str = "input"
    """Text, or a list of chat messages. Every row has it."""
    label_key: str | None = None
    """The reference answer. Every row has it, unless None."""
    metadata_key: str = "metadata"
    """A JSON object; rows may lack it."""
    tool_key: str = "tools"
    """A list of tool descriptions, or its JSON text; rows may lack it."""


@dataclasses.dataclass(frozen=True, slots=True)
class PromptRow:
    """A row's prompt, with label, metadata and tools."""

    prompt: Prompt
    label: str | None
    metadata: dict[str, Any]
    tools: list[dict[str, Any]] | None


def parse_row(values: Mapping[str, Any], fields: PromptFields) -> PromptRow:
    """Read and check the fields of one row. Raises DataError that names the column, its content and what is allowed.

    A key of a message that is null, such as `tool_calls`, counts as missing, and a message without content has the
    content null. All other nulls stay: those in tools, metadata, labels and the arguments of tool calls.
    """
    tools = _tools(values.get(fields.tool_key), fields.tool_key)
    metadata = _metadata(values.get(fields.metadata_key), fields.metadata_key)
    if tools:
        metadata = {**metadata, "tools": tools}
    label = (
        None if fields.label_key is None else _label(_required(values, fields.label_key, "label_key"), fields.label_key)
    )
    return PromptRow(
        _prompt(_required(values, fields.input_key, "input_key"), fields.input_key), label, metadata, tools
    )


def _required(values: Mapping[str, Any], key: str, option: str) -> Any:
    if key not in values:
        present = ", ".join(repr(name) for name in values) or "none"
        raise DataError(f"no {key!r} ({option}); the keys are {present}")
    return values[key]


def _prompt(value: Any, key: str) -> Prompt:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{key!r} is empty text")
        _encodable(value, key)
        return value
    if not isinstance(value, list):
        raise DataError(f"{key!r} is {_kind(value)}; expected text or a list of messages")
    if not value:
        raise DataError(f"{key!r} is an empty list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"{key!r}[{i}] is {_kind(message)}; a message is an object with role and content")
        if not isinstance(message.get("role"), str):
            raise DataError(f"{key!r}[{i}] has no role; its keys are {', '.join(map(repr, message)) or 'none'}")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise DataError(f"{key!r}[{i}] has neither content nor tool_calls")
        if not isinstance(content, str | list | None):
            raise DataError(f"the content of {key!r}[{i}] is {_kind(content)}; expected text or a list of parts")
    if not any(_says_something(message) for message in value):
        raise DataError(f"{key!r} has no message with any text")
    messages: list[Message] = [_without_null_keys(message) for message in value]
    _json(messages, key)
    return messages


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(message.get("tool_calls")) or bool(content.strip() if isinstance(content, str) else content)


def _without_null_keys(message: Mapping[str, Any]) -> Message:
    kept = {key: value for key, value in message.items() if value is not None}
    return kept if "content" in kept else kept | {"content": None}


def _label(value: Any, key: str) -> str | None:
    """Return text unchanged, null as None, and anything else as its JSON text (42 becomes "42").

    Numbers are written in full and without trailing zeros: 1e-05 becomes "0.00001" and 3.0 becomes "3".
    """
    if value is None:
        return None
    if isinstance(value, Decimal):
        if not value.is_finite() or abs(value.adjusted()) > _MAX_EXPONENT:
            raise DataError(f"{key!r} is {value}; expected a finite number of up to {_MAX_EXPONENT} digits, or text")
        return plain_decimal(value)
    if isinstance(value, str):
        _encodable(value, key)
        return value
    return _json(value, key)


def _metadata(value: Any, key: str) -> dict[str, Any]:
    value = _from_json_text(value, key, "object") if isinstance(value, str) else value
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{key!r} is {_kind(value)}; expected an object")
    _json(value, key)
    return value


def _tools(value: Any, key: str) -> list[dict[str, Any]] | None:
    value = _from_json_text(value, key, "list") if isinstance(value, str) else value
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{key!r} is {_kind(value)}; expected a list of objects that describe tools")
    _json(value, key)
    return value


def _from_json_text(text: str, key: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{key!r} is text that is not JSON; expected {expected} or its JSON text") from error


def _json(value: Any, key: str) -> str:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{key!r} cannot be written as JSON: {error}") from error
    return text


def _encodable(text: str, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{key!r} is not valid Unicode text: {error.reason} at {error.start}") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(
        type(value), "a number" if isinstance(value, int | float | Decimal) else f"a {type(value).__name__}"
    )
