"""The environment that a run's processes inherit: the user's, without what would send them astray."""

from __future__ import annotations

import re
from collections.abc import Mapping

from miles.cores import WAIT_VARIABLE
from miles.proxies import without_proxy_for_loopback

_OF_ANOTHER_LAUNCHER = re.compile(
    r"(RANK|LOCAL_RANK|GROUP_RANK|ROLE_RANK|ROLE_NAME|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE|ROLE_WORLD_SIZE"
    r"|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_\w+|TORCH_NCCL_ASYNC_ERROR_HANDLING)"
)
"""Variables that torchrun or a batch script sets for its own ranks: ours would wait for ranks that nobody starts."""
_FATAL = frozenset({"PYTHONOPTIMIZE", "PYTHONWARNINGS"})
"""transformers reads docstrings, which PYTHONOPTIMIZE=2 removes, and libraries warn of each other."""
QUIET_ENVIRONMENT = {WAIT_VARIABLE: "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""Waiting threads do not spin on cores that other processes need, and nothing is downloaded from a hub."""


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a process that this one starts."""
    dropped = {name for name in environment if name in _FATAL or _OF_ANOTHER_LAUNCHER.fullmatch(name)}
    return without_proxy_for_loopback({name: value for name, value in environment.items() if name not in dropped})
