"""Which trainer and which engine a job gets when it names none: by its settings, then by the machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable, Iterator
from typing import Literal

from miles.config.checks.json_file import read_json_object
from miles.config.checks.model_family import why_not_fsdp, why_not_megatron, why_not_sglang, why_not_torch
from miles.config.schema.backend_choice import asks_of_engine, asks_of_trainer
from miles.config.schema.flat_settings import FlatSettings

MEGATRON_PACKAGES = ("megatron.core", "megatron.bridge")
"""Modules of the packages that train_backend megatron takes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A backend that nobody named, and why it is this one."""

    key: Literal["train_backend", "rollout_backend"]
    value: str
    why: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value}: {self.why}"


def is_installed(module: str) -> bool:
    """Return whether a module can be found; of its parent packages alone something is imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def choose_backends(
    settings: FlatSettings, device: Literal["cpu", "cuda"], installed: Callable[[str], bool] = is_installed
) -> Iterator[Choice]:
    """Yield a choice for each of the two backends that is not named.

    Settings that only one backend has ask for it. Otherwise it is Megatron and SGLang on a machine with a GPU and the
    packages, if they know the model, and fsdp and torch elsewhere. Looks packages up and imports none.
    """
    if settings.is_valid("train_backend") and settings.train_backend == "auto":
        value, why = asks_of_trainer(settings) or _trainer(settings, device, installed)
        yield Choice("train_backend", value, why)
    if settings.is_valid("rollout_backend") and settings.rollout_backend == "auto":
        value, why = asks_of_engine(settings) or _engine(settings, device, installed)
        yield Choice("rollout_backend", value, why)


def _trainer(s: FlatSettings, device: str, installed: Callable[[str], bool]) -> tuple[str, str]:
    if device == "cpu":
        return "fsdp", "the device is a CPU"
    if missing := [name for name in MEGATRON_PACKAGES if not installed(name)]:
        return "fsdp", f"{' and '.join(missing)} cannot be imported here"
    model = _model(s)
    if model is not None and (problem := why_not_megatron(model)) is not None and why_not_fsdp(model) is None:
        return "fsdp", problem
    return "megatron", "the device is a GPU, and megatron-core and megatron-bridge are installed"


def _engine(s: FlatSettings, device: str, installed: Callable[[str], bool]) -> tuple[str, str]:
    if device == "cpu":
        return "torch", "the device is a CPU"
    if not installed("sglang"):
        return "torch", "sglang cannot be imported here, and rollout_engine_python names no interpreter that can"
    model = _model(s)
    if model is not None and (problem := why_not_sglang(model)) is not None and why_not_torch(model) is None:
        return "torch", problem
    return "sglang", "the device is a GPU, and sglang is installed"


def _model(s: FlatSettings) -> dict[str, object] | None:
    """The model's config.json, if it can be read and names a type."""
    folder = s.hf_checkpoint if s.is_valid("hf_checkpoint") else None
    model = read_json_object(pathlib.Path(folder or "") / "config.json")
    return model if model.get("model_type") else None
