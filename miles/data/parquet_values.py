"""Values of Parquet columns as JSON has them, so that a row is the same from either kind of file."""

from __future__ import annotations

import datetime
import uuid
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def column_values(column: pa.ChunkedArray) -> list[Any]:
    """Return a column's values as JSON; numbers with decimals are Decimals, in nested values floats.

    Maps are objects, dates and times ISO 8601 text, and binary values text where they are UTF-8; what JSON cannot
    express stays as it is. A struct's null fields are left out: each row has the fields of all others, with null.
    """
    known = _in_microseconds(column.type)
    if known != column.type:
        column = column.cast(known, safe=False)
    values = column.to_pylist(maps_as_pydicts="lossy")
    if _has_short_floats(column.type):
        values = [_shortest(value, column.type) for value in values]
    if _has_struct(column.type):
        values = [_without_nulls(value, column.type) for value in values]
    return [_top(value) for value in values]


def json_value(value: Any) -> Any:
    """Return a nested value as JSON has it."""
    match value:
        case dict():
            return {_key(key): json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [json_value(item) for item in value]
        case Decimal():
            return int(value) if value.as_tuple().exponent == 0 else float(value)
        case datetime.date() | datetime.time():  # datetime too
            return value.isoformat()
        case uuid.UUID():
            return str(value)
        case bytes():
            return _text(value)
    return value


def _top(value: Any) -> Any:
    if isinstance(value, float):
        return Decimal(repr(value))
    return value if isinstance(value, Decimal) else json_value(value)


def _key(key: Any) -> str:
    plain = json_value(key)
    return plain if isinstance(plain, str) else str(plain)


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _in_microseconds(type_: pa.DataType) -> pa.DataType:
    """Return the type with times of microseconds, which Python has, for those of nanoseconds."""
    import pyarrow as pa
    import pyarrow.types as kinds

    if kinds.is_timestamp(type_) and type_.unit == "ns":
        return pa.timestamp("us", type_.tz)
    if kinds.is_time64(type_) and type_.unit == "ns":
        return pa.time64("us")
    if kinds.is_duration(type_) and type_.unit == "ns":
        return pa.duration("us")
    if kinds.is_list(type_):
        return pa.list_(type_.value_field.with_type(_in_microseconds(type_.value_type)))
    if kinds.is_struct(type_):
        return pa.struct([field.with_type(_in_microseconds(field.type)) for field in type_])
    return type_


def _has_short_floats(type_: pa.DataType) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(type_):
        return _has_short_floats(type_.value_type)
    inner = [type_.field(i).type for i in range(type_.num_fields)]
    return kinds.is_float32(type_) or kinds.is_float16(type_) or any(map(_has_short_floats, inner))


def _shortest(value: Any, type_: pa.DataType) -> Any:
    """Return the value with floats of 32 and 16 bits as short as they were written: 0.1 and not 0.10000000149011612."""
    import pyarrow.types as kinds

    if value is None:
        return None
    if kinds.is_float32(type_):
        return float(str(np.float32(value)))
    if kinds.is_float16(type_):
        return float(str(np.float16(value)))
    if kinds.is_dictionary(type_):
        return _shortest(value, type_.value_type)
    if kinds.is_struct(type_):
        return {field.name: _shortest(value[field.name], field.type) for field in type_}
    if kinds.is_map(type_):
        return {key: _shortest(item, type_.item_type) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortest(item, type_.value_type) for item in value]
    return value


def _has_struct(type_: pa.DataType) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(type_):
        return _has_struct(type_.value_type)
    return kinds.is_struct(type_) or any(_has_struct(type_.field(i).type) for i in range(type_.num_fields))


def _without_nulls(value: Any, type_: pa.DataType) -> Any:
    """Return the value without the fields of structs that are null, at any depth; lists and maps keep theirs."""
    import pyarrow.types as kinds

    if value is None:
        return None
    if kinds.is_dictionary(type_):
        return _without_nulls(value, type_.value_type)
    if kinds.is_struct(type_):
        present = [field for field in type_ if value[field.name] is not None]
        return {field.name: _without_nulls(value[field.name], field.type) for field in present}
    if kinds.is_map(type_):
        return {key: _without_nulls(item, type_.item_type) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nulls(item, type_.value_type) for item in value]
    return value
