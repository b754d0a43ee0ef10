"""Checks whether something scores the first row of the prompts, when no setting says what."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any

from miles.config.schema.faults import Fault, RunFault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.sections.reward import BuiltinReward
from miles.reward_names import REWARD_KEY

NAMES = ", ".join(typing.get_args(BuiltinReward))


def reward_faults(s: FlatSettings, path: str, row: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield a fault when neither a setting nor the row names a reward; the controller checks every row."""
    if s.rm_type or s.custom_rm_path or s.reward_service or (s.use_opd and s.opd_kl_coef):
        return
    metadata = row.get(s.metadata_key)
    if not isinstance(metadata, Mapping) or metadata.get(REWARD_KEY) is None:
        problem = f"neither are custom_rm_path and reward_service, and the first row of {path} names no reward"
        remedy = f"set one of them, or name one of {NAMES} as {REWARD_KEY} in each row's {s.metadata_key}"
        yield RunFault("rm_type", None, problem, remedy)
