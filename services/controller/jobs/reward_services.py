"""Checks that every prompt has a reward service that scores it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from miles.data import DataError

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.data import PromptSource

_SERVICE_KEY = "reward_service"
"""Metadata by which a prompt chooses its service."""
_SHOWN = 3


def check_reward_services(config: JobConfig, sources: Iterable[PromptSource]) -> None:
    """Raise DataError when prompts name a service that the job does not have, or name none and there is no default."""
    reward = config.reward
    known = reward.addresses_with_default()
    if reward.rm_type or reward.custom_rm_path:
        known = {"default": "", **known}
    for source in sources:
        named = [str(record.metadata.get(_SERVICE_KEY, "default")) for record in source.prompts]
        strangers = [(row, name) for row, name in enumerate(named) if name not in known]
        if not strangers:
            continue
        row, name = strangers[0]
        others = ", ".join(sorted({each for _, each in strangers})[:_SHOWN])
        chooses = "chooses none" if name == "default" else f"chooses {name!r}"
        raise DataError(
            f"{source.prompts.source}: {len(strangers)} of {len(named)} prompts have no reward service: prompt "
            f"{row + 1} {chooses} by its metadata, and the job has {', '.join(sorted(known)) or 'none'}; add "
            f"--reward-service NAME=HOST:PORT for {others}"
        )
