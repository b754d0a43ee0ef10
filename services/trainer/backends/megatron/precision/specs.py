"""Layer specs of Megatron-Core with the classes of some parts exchanged."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

Exchange = Callable[[type], type]


def exchanged(spec: Any, exchange: Exchange) -> Any:
    """A spec, or a part of one, in which every class is what `exchange` gives for it."""
    if isinstance(spec, type):
        return exchange(spec)
    if isinstance(spec, list):
        return [exchanged(each, exchange) for each in spec]
    if isinstance(spec, functools.partial):
        return functools.partial(spec, **{name: exchanged(part, exchange) for name, part in spec.keywords.items()})
    if not dataclasses.is_dataclass(spec) or isinstance(spec, type):
        return spec
    parts = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.init}
    changes = {name: exchanged(part, exchange) for name, part in parts.items()}
    return dataclasses.replace(spec, **{name: new for name, new in changes.items() if new is not parts[name]})


def exchanging(spec: Any, exchange: Exchange) -> Any:
    """The same for what a provider has as its spec: one, or a function that makes it."""
    if not callable(spec) or dataclasses.is_dataclass(spec):
        return exchanged(spec, exchange)

    @functools.wraps(spec)  # providers look at its parameters
    def made(*arguments: Any, **others: Any) -> Any:
        return exchanged(spec(*arguments, **others), exchange)

    return made
