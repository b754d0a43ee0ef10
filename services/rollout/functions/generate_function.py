"""A generate function of the user's, in any of its forms."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from miles.extensions.loading import ExtensionError, load_function
from miles.utils.types import Sample

GenerateFunction = Callable[[Any, Sample, dict[str, Any], bool], Awaitable[Any]]


def load_generate_function(path: str) -> GenerateFunction:
    """Load a function and adapt it by its signature.

    `fn(args, sample, sampling_params)`, optionally with `evaluation`; or a function, or a class whose instances are
    functions, of one `GenerateFnInput`. What it returns may be a `GenerateFnOutput`. Raises ExtensionError.
    """
    found = load_function(path)
    function: Any = found() if inspect.isclass(found) else found
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise ExtensionError(f"{path} has no signature that can be read: {error}") from error
    if len(names) == 1:
        return _with_input(function)
    if len(names) < 3:
        raise ExtensionError(
            f"{path} takes {', '.join(names) or 'nothing'}; it is called as (args, sample, sampling_params)"
        )
    takes_evaluation = "evaluation" in names

    async def call(args: Any, sample: Sample, params: dict[str, Any], evaluation: bool) -> Any:
        more = {"evaluation": evaluation} if takes_evaluation else {}
        return await _result(function(args, sample, params, **more))

    return call


def _with_input(function: Callable[..., Any]) -> GenerateFunction:
    async def call(args: Any, sample: Sample, params: dict[str, Any], evaluation: bool) -> Any:
        from miles.rollout.base_types import GenerateFnInput
        from miles.rollout.sglang_rollout import GenerateState

        return await _result(function(GenerateFnInput(GenerateState(args), sample, params, evaluation)))

    return call


async def _result(returned: Any) -> Any:
    from miles.rollout.base_types import GenerateFnOutput

    if inspect.isawaitable(returned):
        returned = await returned
    return returned.samples if isinstance(returned, GenerateFnOutput) else returned
