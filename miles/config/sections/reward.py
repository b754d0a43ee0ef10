"""How responses are scored."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from miles.config.schema.section import Derived, DottedPath, Metavar, NonNegative, PositiveFloat, Section


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
    """When a sample could not be scored: generate its group again, or leave the sample out of training (the group too
    when none of its samples has a reward)."""

    @property
    def service_addresses(self) -> dict[str, str]:
        """host:port of each reward service that runs elsewhere, by name."""
        return dict(parse_reward_service(spec) for spec in self.reward_service)


def parse_reward_service(spec: str) -> tuple[str, str]:
    """Split NAME=HOST:PORT into name and address. Raises ValueError saying which part is wrong."""
    name, equals, address = spec.partition("=")
    host, colon, port = address.rpartition(":")
    if not equals or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError("it has no name before =")
    if not colon or not host:
        raise ValueError(f"{address or 'the address'} is not HOST:PORT")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ValueError(f"{port or 'the port'} is not a port from 1 to 65535")
    return name, address
