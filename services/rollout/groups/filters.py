"""Dynamic sampling: filters that drop scored groups before the queue (DAPO, arXiv:2503.14476, section 3.2).

A filter decides; `group_run` carries it out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from miles.threads import only_exceptions
from miles.types import Sample, reward_number

if TYPE_CHECKING:
    from miles.config import JobConfig


DEADLINE_S = 300.0
"""How long an asynchronous filter may take for a group."""


@dataclasses.dataclass(frozen=True, slots=True)
class FilterResult:
    """The verdict on a group: keep it or drop it, and why it is dropped."""

    keep: bool
    reason: str = ""


GroupFilter = Callable[["JobConfig", Sequence[Sample]], Any]
"""Takes the configuration and a group's scored samples; returns, or is a coroutine that returns, a bool, a
`FilterResult`, or any object with `keep` and optionally `reason`."""


class FilterError(ValueError):
    """A filter that cannot be loaded, raised an error, or did not return a verdict."""


def check_reward_nonzero_std(config: JobConfig, samples: Sequence[Sample]) -> FilterResult:
    """Keep a group whose rewards differ: equal rewards give no advantage and so no gradient.

    Samples that failed are ignored; fewer than two rewards have no spread.
    """
    key = config.reward.reward_key
    rewards = [reward_number(sample.reward, key) for sample in samples if sample.reward is not None]
    if len(set(rewards)) > 1:
        return FilterResult(True)
    return FilterResult(False, f"zero_std_{rewards[0]:g}" if rewards else "no_reward")


BUILTIN: dict[str, GroupFilter] = {
    # The name that existing recipes use.
    "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std": check_reward_nonzero_std,
}


def load_filter(path: str) -> GroupFilter:
    """Import the function `package.module.name`. Raises FilterError."""
    if path in BUILTIN:
        return BUILTIN[path]
    module_name, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise FilterError(f"dynamic_sampling_filter_path = {path} cannot be loaded: {error}") from error
    if not callable(function):
        raise FilterError(f"dynamic_sampling_filter_path = {path} is a {type(function).__name__}, not a function")
    loaded: GroupFilter = function
    return loaded


async def apply_filter(
    function: GroupFilter | None, config: JobConfig, samples: Sequence[Sample], deadline_s: float = DEADLINE_S
) -> FilterResult:
    """Return the filter's verdict; without a filter, keep. Raises FilterError when the user's code fails or hangs."""
    if function is None:
        return FilterResult(True)
    name = getattr(function, "__qualname__", repr(function))
    deadline = asyncio.timeout(deadline_s)
    try:
        with only_exceptions():
            verdict = function(config, samples)
            if inspect.isawaitable(verdict):
                async with deadline:
                    verdict = await verdict
    except Exception as error:  # the user's code may raise anything
        if deadline.expired():
            raise FilterError(f"filter {name} gave no verdict within {deadline_s:g} s") from None
        raise FilterError(f"filter {name} raised {type(error).__name__}: {error}") from error
    if isinstance(verdict, bool):
        return FilterResult(verdict, "" if verdict else name)
    keep = getattr(verdict, "keep", None)
    if not isinstance(keep, bool):
        raise FilterError(f"filter {name} returned {verdict!r}; return True, False, or an object with keep and reason")
    return FilterResult(keep, "" if keep else str(getattr(verdict, "reason", None) or name))
