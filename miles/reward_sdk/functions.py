"""Reward functions: their types, their registration and how they are loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from miles.extensions.loading import ALIASES
from miles.reward_sdk.recipe_functions import adapted, takes_args
from miles.reward_sdk.scored import Scored, Value

if TYPE_CHECKING:
    from miles.types import Sample


class RewardLoadError(ValueError):
    """A reward function cannot be found or used; the message says which and why."""


SampleFunction = Callable[["Sample"], Value | Scored | Awaitable[Value | Scored]]
GroupFunction = Callable[["list[Sample]"], Sequence[Value | Scored] | Awaitable[Sequence[Value | Scored]]]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, slots=True)
class RewardFunction:
    """A function that scores one sample, or the samples of one prompt together."""

    name: str
    call: SampleFunction | GroupFunction
    group: bool = False
    """True: called with the list of a prompt's samples, returns one reward a sample, in order."""

    @property
    def is_async(self) -> bool:
        """Whether calling it returns an awaitable."""
        return inspect.iscoroutinefunction(self.call) or inspect.iscoroutinefunction(
            getattr(self.call, "__call__", None)  # noqa: B004 (an instance with an async __call__)
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a worker process finds reward functions."""

    target: str
    """The dotted path of a function, `package.module.function`; with `script`, a module or a Python file's path."""
    name: str = ""
    """The name to serve the function under; empty means its own."""
    group: bool = False
    """Whether the function scores whole groups."""
    script: bool = False
    """Whether to run `target` to register the functions that it decorates with `reward`."""


registered: dict[str, RewardFunction] = {}
"""Functions decorated with `reward` in this process, by name, in order of definition."""


@overload
def reward(function: Function) -> Function: ...


@overload
def reward(*, name: str = "", group: bool = False) -> Callable[[Function], Function]: ...


def reward(
    function: Function | None = None, *, name: str = "", group: bool = False
) -> Function | Callable[[Function], Function]:
    """Register a function as a reward; the function itself is returned unchanged.

    Args:
        function: `fn(sample) -> float | dict[str, float] | Scored`, or async; with `group`, `fn(samples)` returns a
            list of those.
        name: what callers ask for; the function's own name by default.
        group: whether the function scores the samples of one prompt together.

    Raises:
        RewardLoadError: when two functions have the same name.
    """

    def register(function: Function) -> Function:
        own = RewardFunction(name or function.__name__, function, group)
        if own.name in registered:
            raise RewardLoadError(f"two reward functions are named {own.name!r}; give one of them another name")
        registered[own.name] = own
        return function

    return register if function is None else register(function)


running_script = False
"""True while a worker process runs a user's script to register its functions."""


class StopScript(BaseException):
    """Ends a user's script at its call of `serve` when a worker process runs it to register its functions."""


def load(sources: Sequence[Source]) -> dict[str, RewardFunction]:
    """Import every source and return its functions by name, in order.

    Raises:
        RewardLoadError: when a source cannot be imported, names nothing callable, or two have the same name.
    """
    functions: dict[str, RewardFunction] = {}
    for source in sources:
        for function in _load_one(source):
            if function.name in functions:
                raise RewardLoadError(f"two reward functions are named {function.name!r}; rename one of them")
            functions[function.name] = function
    if not functions:
        raise RewardLoadError("no reward function to serve: decorate one with @reward, or name one")
    return functions


def _load_one(source: Source) -> list[RewardFunction]:
    if source.script:
        return _run_script(source.target)
    module_name, _, attribute = source.target.rpartition(".")
    if not module_name:
        raise RewardLoadError(f"{source.target!r} is not a dotted path; write it as package.module.function")
    _add_to_path(os.getcwd())  # users name modules of the folder they work in
    _add_to_path(ALIASES)  # and import what they score from another system's names
    with _raised_as_load_error(f"cannot import {module_name!r} for reward {source.target!r}"):
        module = importlib.import_module(module_name)
    call = getattr(module, attribute, None)
    if call is None:
        raise RewardLoadError(f"module {module_name!r} ({module.__file__}) has no {attribute!r}")
    if not callable(call):
        raise RewardLoadError(f"{source.target!r} is a {type(call).__name__}, not a function")
    decorated = next((function for function in registered.values() if function.call is call), None)
    group = source.group or (decorated is not None and decorated.group)
    if takes_args(call):
        with _raised_as_load_error(f"reward {source.target!r} cannot be used"):
            call = adapted(call, group=group)
    return [RewardFunction(source.name or attribute, call, group)]


def _run_script(target: str) -> list[RewardFunction]:
    global running_script
    registered.clear()
    running_script = True
    try:
        with _raised_as_load_error(f"running {target} failed"), contextlib.suppress(StopScript):
            if target.endswith(".py"):
                _run_file(target)
            else:
                importlib.import_module(target)
    finally:
        running_script = False
    return list(registered.values())


@contextlib.contextmanager
def _raised_as_load_error(problem: str) -> Iterator[None]:
    """Raise whatever the user's code raises while it is loaded as a RewardLoadError."""
    try:
        yield
    except Exception as error:
        raise RewardLoadError(f"{problem}: {type(error).__name__}: {error}") from error


def _run_file(path: str) -> None:
    _add_to_path(os.path.dirname(os.path.abspath(path)))  # as when Python runs the file itself
    spec = importlib.util.spec_from_file_location("__reward_script__", path)
    if spec is None or spec.loader is None:
        raise RewardLoadError(f"{path} cannot be run as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def _add_to_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)
