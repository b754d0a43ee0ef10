"""Checks that the packages of trackers are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from miles.config.schema.faults import RunFault
from miles.config.schema.flat_settings import FlatSettings

_PACKAGES = {"use_tensorboard": "tensorboard", "use_wandb": "wandb", "use_mlflow": "mlflow"}


def tracker_faults(s: FlatSettings) -> Iterator[RunFault]:
    """Yield a fault for each tracker whose package is not there."""
    for key, package in _PACKAGES.items():
        if getattr(s, key) and importlib.util.find_spec(package) is None:
            remedy = "pip install 'miles[controller,trackers]', or leave it out"
            yield RunFault(key, True, f"the package {package} is not installed", remedy)
