"""Which trainer and which engine a job gets when it names none: by its settings, then by the machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from collections.abc import Iterator
from typing import Literal

from miles.config.checks.json_file import read_json_object
from miles.config.checks.model_family import why_not_fsdp, why_not_megatron, why_not_sglang, why_not_torch
from miles.config.schema.backend_choice import asks_of_engine, asks_of_trainer
from miles.config.schema.flat_settings import FlatSettings, InvalidSetting

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


def choose_backends(settings: FlatSettings, device: Literal["cpu", "cuda"]) -> Iterator[Choice]:
    """Yield a choice for each of the two backends that is not named.

    Settings that only one backend has ask for it. Otherwise it is Megatron and SGLang on a machine with a GPU and the
    packages, if they know the model, and fsdp and torch elsewhere. Looks packages up and imports none.
    """
    for key, choose in (("train_backend", _trainer), ("rollout_backend", _engine)):
        if not settings.is_valid(key) or getattr(settings, key) not in (None, "auto"):
            continue
        try:
            value, why = choose(settings, device)
        except InvalidSetting:
            continue  # which is reported, and the choice is what derivation takes
        yield Choice(key, value, why)  # type: ignore[arg-type]


def _trainer(s: FlatSettings, device: str) -> tuple[str, str]:
    asked = asks_of_trainer(s)
    if asked is not None:
        return asked
    if device == "cpu":
        return "fsdp", "the device is a CPU"
    missing = [name for name in MEGATRON_PACKAGES if not is_installed(name)]
    if missing:
        return "fsdp", f"{' and '.join(missing)} cannot be imported here"
    model = _model(s)
    if model is not None and (problem := why_not_megatron(model)) is not None and why_not_fsdp(model) is None:
        return "fsdp", problem
    return "megatron", "the device is a GPU, and megatron-core and megatron-bridge are installed"


def _engine(s: FlatSettings, device: str) -> tuple[str, str]:
    asked = asks_of_engine(s)
    if asked is not None:
        return asked
    if device == "cpu":
        return "torch", "the device is a CPU"
    if not is_installed("sglang"):
        return "torch", "sglang cannot be imported here, and rollout_engine_python names no interpreter that can"
    model = _model(s)
    if model is not None and (problem := why_not_sglang(model)) is not None and why_not_torch(model) is None:
        return "torch", problem
    return "sglang", "the device is a GPU, and sglang is installed"


def is_installed(module: str) -> bool:
    """Return whether a module can be found; of its parent packages alone something is imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _model(s: FlatSettings) -> dict[str, object] | None:
    """The model's config.json, if it can be read and names a type."""
    model = read_json_object(pathlib.Path(s.hf_checkpoint or "") / "config.json")
    return model if model.get("model_type") else None
