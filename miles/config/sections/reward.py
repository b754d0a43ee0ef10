"""Rewards: how responses are scored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from miles.addresses import why_not_address
from miles.config.schema.section import Derived, DottedPath, Metavar, NonNegative, PositiveFloat, Section
from miles.reward_names import DEFAULT_SERVICE, REWARD_KEY, SERVICE_KEY

BuiltinReward = Literal["exact_match", "last_number", "math", "deepscaler", "dapo"]


class RewardConfig(Section):
    """Scoring: a built-in reward, a function, or services."""

    rm_type: BuiltinReward | None = None
    """Built-in reward of rows whose metadata names none (as rm_type); every row has to where custom_rm_path and
    reward_service are not given either."""

    custom_rm_path: Annotated[str | None, DottedPath(), Metavar("MODULE.NAME")] = None
    """Async function that scores a sample, instead of rm_type."""

    reward_service: Annotated[tuple[str, ...], Metavar("NAME=HOST:PORT")] = ()
    """Address of a reward service that runs elsewhere; repeatable. The one named default scores samples without a name,
    as does the only one when neither rm_type nor custom_rm_path is given."""

    reward_key: str | None = None
    """Name of the number to train on, when a reward has several."""

    eval_reward_key: Annotated[str | None, Derived("reward_key")] = None
    """Name of the number to evaluate with, when a reward has several."""

    group_rm: bool = False
    """Score the samples of a prompt together."""

    reward_timeout_s: PositiveFloat = 60.0
    """Timeout of a reward call, in seconds."""

    reward_retries: NonNegative = 2
    """Number of retries of a failed reward call."""

    reward_failure_policy: Literal["retry", "drop"] = "retry"
    """What to do when a sample cannot be scored: generate its group again (retry), or train without the sample (drop; a
    group without any reward is discarded)."""

    @property
    def service_addresses(self) -> dict[str, str]:
        """The host:port of each external reward service, by name."""
        return dict(parse_reward_service(spec) for spec in self.reward_service)

    @property
    def scored_here(self) -> bool:
        """Whether the run has a reward worker of its own, and not just services that run elsewhere."""
        return bool(self.rm_type or self.custom_rm_path or not self.reward_service)

    def addresses_with_default(self) -> dict[str, str]:
        """The same with a default where they name one: the only service, when nothing else scores, has no choice."""
        addresses = self.service_addresses
        if len(addresses) == 1 and not (self.rm_type or self.custom_rm_path):
            return {DEFAULT_SERVICE: next(iter(addresses.values())), **addresses}
        return addresses

    def service_of(self, metadata: Mapping[str, Any]) -> str:
        """The name of the service that scores a sample, by its metadata."""
        return str(metadata.get(SERVICE_KEY, DEFAULT_SERVICE))

    def reward_of(self, metadata: Mapping[str, Any]) -> str:
        """The name of the reward that its service is asked for; empty means the service's own default.

        Services from outside and a function of the user's have names of their own; rm_type names a built-in reward.
        """
        chosen = metadata.get(REWARD_KEY)
        if isinstance(chosen, str):
            return chosen
        outside = self.service_of(metadata) in self.addresses_with_default() or self.custom_rm_path is not None
        return "" if outside or self.rm_type is None else self.rm_type


def parse_reward_service(spec: str) -> tuple[str, str]:
    """Split NAME=HOST:PORT into name and address. Raises ValueError that names the wrong part."""
    name, equals, address = spec.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError("it has no name before =")
    if (problem := why_not_address(address)) is not None:
        raise ValueError(problem)
    return name, address
