"""Conversion of what a reward function returned or raised to the `Score` on the wire."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from miles.reward_sdk.scored import Scored
from miles.rpc.gen import reward_pb2, sample_pb2
from miles.types.convert import json_to_text, reward_to_proto

if TYPE_CHECKING:
    from miles.reward_sdk.functions import RewardFunction

_MAX_TEXT = 1000
"""Characters of an exception's message that are passed on."""


def sample_id(sample: sample_pb2.Sample) -> str:
    """The name of a sample in errors."""
    return f"sample {sample.index} of group {sample.group_id}"


def error_score(message: str) -> reward_pb2.Score:
    """The score of a sample that could not be scored."""
    return reward_pb2.Score(error=message.encode("utf-8", "backslashreplace").decode())  # protobuf refuses surrogates


def raised(function: str, error: BaseException) -> str:
    """The message for an exception of a reward function, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"reward {function!r} raised {type(error).__name__}: {_text(error)}{where}"


def sample_score(function: RewardFunction, value: object, subject: str) -> reward_pb2.Score:
    """The score for one returned value; an error score when the value is not a reward."""
    try:
        scored = value if isinstance(value, Scored) else Scored(value)  # type: ignore[arg-type]  # checked here
        return reward_pb2.Score(reward=_reward(scored.reward), metadata_json=_metadata_json(scored.metadata))
    except Exception as error:  # a returned object's own methods may raise anything
        return error_score(f"reward {function.name!r} returned {_text(error)} on {subject}")


def group_scores(function: RewardFunction, values: object, subjects: Sequence[str]) -> list[reward_pb2.Score]:
    """One score a sample for what a group function returned."""
    returned = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Sequence):
        problem = f"a {type(values).__name__}; a group reward returns a list, one reward a sample"
    elif len(returned) != len(subjects):
        problem = f"{len(returned)} rewards for {len(subjects)} samples"
    else:
        return [sample_score(function, value, subject) for value, subject in zip(returned, subjects, strict=True)]
    return [error_score(f"reward {function.name!r} returned {problem} on {subject}") for subject in subjects]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_TEXT]
    except Exception:  # of the exception's own __str__
        return "(its message cannot be shown)"


def _reward(value: object) -> sample_pb2.Reward:
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("an empty dict; it needs at least one named number")
        return reward_to_proto({_name(key): _number(number, f"{key!r}: ") for key, number in value.items()})
    return reward_to_proto(_number(value))


def _name(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a dict with the key {key!r}; keys are strings")
    return key


def _number(value: object, prefix: str = "") -> float:
    if not isinstance(value, numbers.Real | np.bool_):
        raise TypeError(f"{prefix}{value!r:.200}, a {type(value).__name__}; return a float or a dict of floats")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{prefix}{number}; rewards are finite")
    return number


def _metadata_json(metadata: object) -> str:
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata of type {type(metadata).__name__}; metadata is a dict")
    return json_to_text(dict(metadata), "metadata") if metadata else ""
