"""Conversion between the system's samples and those that functions of users see."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from miles.types import Sample
from miles.utils import types as users

if TYPE_CHECKING:
    from miles.config import JobConfig

ATTRIBUTES_KEY = "sample_attributes"
"""Key of a sample's metadata with the attributes that a function set besides the fields."""

Render = Callable[[Sample], "str | list[dict[str, Any]]"]


def given_prompt(sample: Sample) -> str | list[dict[str, Any]]:
    """Return the prompt as the data set has it."""
    return sample.prompt


def prompt_renderer(tokenizer: Any) -> Render:
    """Return the function that gives a sample's prompt as the text that was tokenised."""

    def render(sample: Sample) -> str:
        tokens = sample.prompt_tokens.tolist()
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return render


def renderer_of(config: JobConfig, tokenizer: Any) -> Render:
    """Return the function that gives the prompts of a job's samples as functions of users expect them."""
    return prompt_renderer(tokenizer) if config.data.apply_chat_template else given_prompt


def users_sample(sample: Sample, *, group_size: int, render: Render = given_prompt) -> users.Sample:
    """Return the sample as a function of the user's sees it.

    Without a response it has no tokens either: functions tokenise the prompt themselves, or take it as it is.
    """
    metadata = dict(sample.metadata)
    attributes = metadata.pop(ATTRIBUTES_KEY, None)
    found = users.Sample(
        group_index=sample.group_id,
        index=sample.group_id * group_size + sample.index,
        prompt=render(sample),
        tokens=sample.tokens.tolist() if sample.response_length else [],
        response=sample.response,
        response_length=sample.response_length,
        label=_label(sample.label),
        reward=dict(sample.reward) if isinstance(sample.reward, dict) else sample.reward,
        loss_mask=_list(sample.loss_mask),
        weight_versions=[str(span.version) for span in sample.weight_versions],
        rollout_log_probs=_list(sample.rollout_log_probs),
        rollout_routed_experts=sample.rollout_routed_experts,
        teacher_log_probs=_list(sample.teacher_log_probs),
        remove_sample=sample.remove_sample,
        status=users.Sample.Status(sample.status.value),
        metadata=metadata,
    )
    for name, value in (attributes or {}).items():
        setattr(found, name, value)
    return found


def users_group(samples: Sequence[Sample], render: Render = given_prompt) -> list[users.Sample]:
    """Return the samples of one prompt as a function of the user's sees them."""
    return [users_sample(sample, group_size=len(samples), render=render) for sample in samples]


def attributes_of(sample: users.Sample) -> dict[str, Any]:
    """Return the attributes that are no fields, have a value, and can be stored as JSON."""
    own = {name: value for name, value in vars(sample).items() if name not in users.FIELDS}
    return {name: value for name, value in own.items() if value is not None and _is_json(value)}


def metadata_of(sample: users.Sample) -> dict[str, Any]:
    """Return the metadata to keep of a function's sample, its own attributes among it."""
    attributes = attributes_of(sample)
    return {**sample.metadata, **({ATTRIBUTES_KEY: attributes} if attributes else {})}


def take_decisions(sample: Sample, seen: users.Sample) -> Sample:
    """Return the sample with what a filter or hook decided: reward, loss mask, metadata and removal."""
    import numpy as np

    mask = None if seen.loss_mask is None else np.asarray(seen.loss_mask, np.uint8)
    return dataclasses.replace(
        sample, reward=seen.reward, loss_mask=mask, metadata=metadata_of(seen), remove_sample=bool(seen.remove_sample)
    )


def _label(text: str | None) -> Any:
    """Return a label as functions expect it: one that is a JSON object, which is stored as text, as an object."""
    if text is None or not text.startswith("{"):
        return text
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return text
    return found if isinstance(found, dict) else text


def _list(array: Any) -> list[Any] | None:
    return None if array is None else array.tolist()


def _is_json(value: Any) -> bool:
    match value:
        case None | bool() | int() | float() | str():
            return True
        case list() | tuple():
            return all(_is_json(item) for item in value)
        case dict():
            return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
        case _:
            return False
