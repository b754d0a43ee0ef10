"""Dynamic sampling: filters that drop scored groups before the queue (DAPO, arXiv:2503.14476, section 3.2).

A filter decides; `group_run` carries it out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from miles.extensions.loading import ExtensionError, load_function
from miles.extensions.samples import Render, users_group
from miles.rollout.filter_hub.base_types import DynamicFilterOutput
from miles.threads import only_exceptions
from miles.types import Sample

DEADLINE_S = 300.0
"""How long an asynchronous filter may take for a group."""


@dataclasses.dataclass(frozen=True, slots=True)
class GroupFilter:
    """A function `fn(args, samples, **kwargs)` that gives a verdict on the scored samples of a prompt.

    It returns, or is a coroutine that returns, a bool, a `DynamicFilterOutput`, or any object with `keep` and
    optionally `reason`.
    """

    function: Callable[..., Any]
    args: Any
    render: Render


class FilterError(ValueError):
    """A filter that cannot be loaded, raised an error, or did not return a verdict."""


def load_filter(path: str, args: Any, render: Render) -> GroupFilter:
    """Import the function `package.module.name`; `render` shows it prompts. Raises FilterError."""
    try:
        return GroupFilter(load_function(path), args, render)
    except ExtensionError as error:
        raise FilterError(f"dynamic_sampling_filter_path = {error}") from error


async def apply_filter(
    group_filter: GroupFilter | None, samples: Sequence[Sample], deadline_s: float = DEADLINE_S
) -> DynamicFilterOutput:
    """Return the filter's verdict; without a filter, keep. Raises FilterError when the user's code fails or hangs."""
    if group_filter is None:
        return DynamicFilterOutput(True)
    function = group_filter.function
    name = getattr(function, "__qualname__", repr(function))
    seen = users_group(samples, group_filter.render)
    deadline = asyncio.timeout(deadline_s)
    try:
        with only_exceptions():
            verdict = function(group_filter.args, seen)
            if inspect.isawaitable(verdict):
                async with deadline:
                    verdict = await verdict
    except Exception as error:  # the user's code may raise anything
        if deadline.expired():
            raise FilterError(f"filter {name} gave no verdict within {deadline_s:g} s") from None
        raise FilterError(f"filter {name} raised {type(error).__name__}: {error}") from error
    keep = _flag(getattr(verdict, "keep", verdict))
    if keep is None:
        raise FilterError(f"filter {name} returned {verdict!r}; return True, False, or an object with keep and reason")
    return DynamicFilterOutput(keep, None if keep else str(getattr(verdict, "reason", None) or name))


def _flag(value: Any) -> bool | None:
    """Return a bool, or that of a scalar of numpy or torch; None for anything else."""
    if not isinstance(value, bool) and getattr(value, "shape", None) == ():
        value = value.item()
    return value if isinstance(value, bool) else None
