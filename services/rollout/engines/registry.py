"""The inference engines by name, each built from the folder of its name.

To add one: a folder beside this file with `create` and `configured_options` (see `EnginePackage`) that builds a
`base.RolloutEngine`, and an entry in `miles.engine_spec` that describes what it can take.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from miles.engine_spec import engine_spec

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.services.rollout.engines.base import RolloutEngine


class EnginePackage(Protocol):
    """What the folder of an engine offers."""

    @staticmethod
    def create(**options: Any) -> RolloutEngine:
        """Build the engine with its own options; nothing is loaded before `start`."""

    @staticmethod
    def configured_options(
        config: JobConfig, *, device: str, name: str, engine_addresses: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The options that a job's configuration asks for; the arguments are those of `configured_engine`."""


def create_engine(name: str, /, **options: Any) -> RolloutEngine:
    """Build the engine called `name` with its own options; nothing is loaded before `start`.

    Raises ValueError for a name that has no description.
    """
    return _package(name).create(**options)


def configured_engine(
    config: JobConfig, *, device: str, name: str, engine_addresses: Sequence[str] = ()
) -> RolloutEngine:
    """Build the engine that a job's configuration asks for, on a device ("cpu", "cuda:1", "auto", ...).

    `name` tells this worker from others; `engine_addresses`: servers to attach to.
    """
    package = _package(config.rollout.rollout_backend)
    return package.create(
        **package.configured_options(config, device=device, name=name, engine_addresses=engine_addresses)
    )


def _package(name: str) -> EnginePackage:
    # Imported on demand: the dependencies of other engines need not be installed.
    return cast(EnginePackage, importlib.import_module(f"{__package__}.{engine_spec(name).name}"))
