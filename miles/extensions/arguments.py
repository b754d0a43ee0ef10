"""The `args` that functions of users get: every setting as an attribute."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

SETTINGS_VARIABLE = "MILES_SETTINGS"
"""Environment variable with the settings of a run as JSON, for processes that get no configuration otherwise."""
SECRET = ("redis_url", "train_env_vars")
"""Settings that may hold passwords; functions do not get them."""
_FACTS: Mapping[str, Any] = {
    "ci_test": False,
    "rollout_global_dataset": True,
    "sglang_enable_deterministic_inference": False,
    "sglang_speculative_algorithm": None,
    "sglang_dp_size": 1,
    "use_distributed_post": False,
    "router_policy": None,
}
"""Names of other systems' that functions look up, with what is so here, unless a setting says it."""


class Args(argparse.Namespace):
    """Every setting under its name, the keys of custom_config_path that are no settings, and some constants."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"args has no {name}: there is no such setting, and custom_config_path has no such key")


def args_of(flat: Mapping[str, Any], **more: Any) -> Args:
    """Build the arguments from a configuration's flat object and further attributes."""
    settings = {key: value for key, value in flat.items() if key not in SECRET}
    return Args(**{**_FACTS, **settings, **(settings.get("custom_settings") or {}), **more})


def settings_text(flat: Mapping[str, Any]) -> str:
    """Return the value of `SETTINGS_VARIABLE` for a run."""
    return json.dumps({key: value for key, value in flat.items() if key not in SECRET and value is not None})


def args_of_environment() -> Args:
    """Return the arguments that this process was started with; without any there are no settings among them."""
    return args_of(_Settings(json.loads(os.environ.get(SETTINGS_VARIABLE) or "{}")))


class _Settings(dict[str, Any]):
    """Settings that were not given are None, as in the configuration."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        from miles.config.schema.catalog import catalog

        super().__init__(dict.fromkeys(catalog()) | dict(given) if given else {})
