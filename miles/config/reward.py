"""How responses are scored."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.section import Derived, DottedPath, Metavar, NonNegative, PositiveFloat, Section


class RewardConfig(Section):
    """Scoring: a built-in reward, a function, or services."""

    rm_type: Literal["exact_match", "last_number", "math"] | None = None
    """Built-in reward."""

    custom_rm_path: Annotated[str | None, DottedPath(), Metavar("MODULE.NAME")] = None
    """Async function that scores a sample, in place of rm_type."""

    reward_service: Annotated[tuple[str, ...], Metavar("NAME=HOST:PORT")] = ()
    """Reward services that run elsewhere; the one named default scores samples that name none. Repeatable."""

    reward_key: str | None = None
    """Which number to train on, when a reward has several."""

    eval_reward_key: Annotated[str | None, Derived("reward_key")] = None
    """The same for evaluation."""

    group_rm: bool = False
    """Score the samples of a prompt together."""

    reward_timeout_s: PositiveFloat = 60.0
    """How long one call may take, in seconds."""

    reward_retries: NonNegative = 2
    """How often a failed call is repeated."""

    reward_failure_policy: Literal["retry", "drop"] = "retry"
    """A group with a sample that could not be scored is generated again, or dropped."""
