"""Rewards in the form `fn(args, sample, **kwargs)`, as slime's and miles' recipes write them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.extensions.arguments import Args, args_of_environment
from miles.extensions.loading import ExtensionError
from miles.extensions.samples import Render, given_prompt, metadata_of, prompt_renderer, users_group, users_sample
from miles.reward_sdk.scored import Scored

if TYPE_CHECKING:
    from miles.types import Sample
    from miles.utils import types as users

DETAILS_KEY = "reward_details"
"""Key of a sample's metadata with those parts of a reward that are no numbers."""


def takes_args(function: Callable[..., Any]) -> bool:
    """Return whether a function needs two positional arguments: args, and a sample or samples."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some that are written in C have none
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is inspect.Parameter.empty for each in parameters) >= 2


def adapted(function: Callable[..., Any], *, group: bool) -> Callable[[Any], Any]:
    """Return a function of a sample (or the samples of a prompt) that calls `function(args, …)`.

    What the function writes into the sample's metadata is kept, and parts of a reward that are no numbers go there. The
    returned function is asynchronous if `function` is. Raises ExtensionError when the prompts cannot be rendered.
    """
    args = args_of_environment()
    render = _render(args)
    size = getattr(args, "n_samples_per_prompt", None) or 1

    def seen(argument: Any) -> Any:
        return users_group(argument, render) if group else users_sample(argument, group_size=size, render=render)

    def scored(argument: Any, shown: Any, returned: Any) -> Any:
        if not group:
            return _scored(argument, shown, returned)
        if not isinstance(returned, Sequence) or len(returned) != len(argument):
            return returned  # reported by who reads it
        return [_scored(*each) for each in zip(argument, shown, returned, strict=True)]

    async def call_async(argument: Any) -> Any:
        shown = seen(argument)
        return scored(argument, shown, await function(args, shown))

    def call(argument: Any) -> Any:
        shown = seen(argument)
        return scored(argument, shown, function(args, shown))

    return call_async if inspect.iscoroutinefunction(function) else call


def _scored(sample: Sample, seen: users.Sample, returned: Any) -> Any:
    metadata = {key: value for key, value in metadata_of(seen).items() if sample.metadata.get(key) != value}
    value = returned.reward if isinstance(returned, Scored) else returned
    if isinstance(value, Mapping):
        numbers = {key: number for key, number in value.items() if isinstance(number, int | float)}
        if others := {key: other for key, other in value.items() if key not in numbers}:
            metadata[DETAILS_KEY] = others
        value = numbers
    if isinstance(returned, Scored):
        metadata |= returned.metadata
    return Scored(value, metadata)


def _render(args: Args) -> Render:
    """Return what shows prompts as they were tokenised; without a chat template that is the prompt itself."""
    if not getattr(args, "apply_chat_template", False):
        return given_prompt
    try:
        from miles.data.template import load_tokenizer

        return prompt_renderer(load_tokenizer(args.hf_checkpoint, getattr(args, "chat_template_path", None)))
    except (ImportError, ValueError) as error:
        raise ExtensionError(f"prompts cannot be rendered for a reward that takes args: {error}") from error
