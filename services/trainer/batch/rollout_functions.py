"""Functions of users that see a whole rollout before it is trained on; rank 0 calls them once, for all ranks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from miles.extensions.arguments import Args, args_of
from miles.extensions.loading import ExtensionError, ExtensionFailed, described, load_function
from miles.extensions.samples import Render, given_prompt, renderer_of, take_decisions, users_group
from miles.services.trainer.batch.rollout_batch import SHAPED_REWARD
from miles.threads import only_exceptions
from miles.types import SampleGroup, SampleStatus

if TYPE_CHECKING:
    from miles.config import JobConfig


class RolloutFunctions:
    """Calls rollout_sample_filter_path and custom_reward_post_process_path, where they are set."""

    def __init__(self, config: JobConfig) -> None:
        """Load the functions. Raises ExtensionError."""
        extensions = config.extensions
        self._filter = _load(extensions.rollout_sample_filter_path)
        self._rewards = _load(extensions.custom_reward_post_process_path)
        self._config = config
        self._args: Args | None = None
        self._render: Render | None = None

    async def apply(self, groups: Sequence[SampleGroup]) -> None:
        """Change the samples of a rollout as the functions say, off the event loop.

        Raises ExtensionFailed when one raises an error, and ExtensionError when it returns what cannot be used.
        """
        if self._filter is not None or self._rewards is not None:
            await asyncio.to_thread(self._apply, sorted(groups, key=lambda group: group.group_id))

    def _apply(self, groups: Sequence[SampleGroup]) -> None:
        if self._args is None or self._render is None:
            self._args, self._render = args_of(self._config.to_flat()), _renderer(self._config)
        if self._filter is not None:
            self._filter_samples(groups)
        if self._rewards is not None:
            self._shape_rewards(groups)

    def _filter_samples(self, groups: Sequence[SampleGroup]) -> None:
        """Take what `fn(args, groups)` has set in the samples: removal, loss mask, reward and metadata."""
        assert self._render is not None
        seen = [users_group(group.samples, self._render) for group in groups]
        _call("rollout_sample_filter_path", self._filter, self._args, seen)
        for group, shown in zip(groups, seen, strict=True):
            group.samples[:] = [take_decisions(sample, s) for sample, s in zip(group.samples, shown, strict=True)]

    def _shape_rewards(self, groups: Sequence[SampleGroup]) -> None:
        """Keep the second of `fn(args, samples) -> (raw rewards, rewards)` as what advantages are computed from."""
        assert self._render is not None
        samples = [s for group in groups for s in group.samples if s.status is not SampleStatus.FAILED]
        seen = [
            shown
            for group in groups
            for shown in users_group(group.samples, self._render)
            if shown.status is not type(shown).Status.FAILED
        ]
        key = "custom_reward_post_process_path"
        returned = _call(key, self._rewards, self._args, seen)
        try:
            raw, shaped = (_numbers(part) for part in returned)
        except (TypeError, ValueError) as error:
            raise ExtensionError(f"{key}: return (raw rewards, rewards), numbers both; it returned {error}") from error
        if not len(raw) == len(shaped) == len(samples):
            counts = f"{len(raw)} raw rewards and {len(shaped)} rewards for {len(samples)} samples"
            raise ExtensionError(f"{key} returned {counts}; failed samples are not among them")
        for sample, number, reward in zip(samples, raw, shaped, strict=True):
            if not isinstance(sample.reward, dict):
                sample.reward = number
            sample.metadata = {**sample.metadata, SHAPED_REWARD: reward}


def _load(path: str | None) -> Callable[..., Any] | None:
    return None if path is None else load_function(path)


def _call(key: str, function: Callable[..., Any] | None, *arguments: Any) -> Any:
    assert function is not None
    try:
        with only_exceptions():
            return function(*arguments)
    except Exception as error:  # the user's code may raise anything
        raise ExtensionFailed(f"{key} raised {described(error)}") from error


def _numbers(values: Any) -> list[float]:
    found = [float(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
    if not all(map(math.isfinite, found)):
        raise ValueError("a number that is not finite")
    return found


def _renderer(config: JobConfig) -> Render:
    if not config.data.apply_chat_template:
        return given_prompt
    from miles.data.template import load_tokenizer

    return renderer_of(config, load_tokenizer(str(config.rollout.hf_checkpoint), config.data.chat_template_path))
