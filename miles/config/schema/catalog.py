"""The catalog of all fields of all sections, from which command line, reference page and checks are generated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from miles.config.schema.section import (
    Derived,
    DottedPath,
    Ignored,
    Metavar,
    Negated,
    Passthrough,
    Section,
    States,
    base_type,
    choices,
    element_type,
    note,
)
from miles.config.sections.algorithm import AlgorithmConfig
from miles.config.sections.architecture import ArchitectureConfig
from miles.config.sections.attention import AttentionConfig
from miles.config.sections.checkpoint import CheckpointConfig
from miles.config.sections.cluster import ClusterConfig
from miles.config.sections.data import DataConfig
from miles.config.sections.debug import DebugConfig
from miles.config.sections.distillation import DistillationConfig
from miles.config.sections.drafts import DraftsConfig
from miles.config.sections.eval import EvalConfig
from miles.config.sections.experts import ExpertsConfig
from miles.config.sections.extensions import ExtensionsConfig
from miles.config.sections.fault_tolerance import FaultToleranceConfig
from miles.config.sections.gateway import GatewayConfig
from miles.config.sections.lora import LoraConfig
from miles.config.sections.megatron import MegatronConfig
from miles.config.sections.moe import MoeConfig
from miles.config.sections.numerics import NumericsConfig
from miles.config.sections.optimizer import OptimizerConfig
from miles.config.sections.policy_loss import PolicyLossConfig
from miles.config.sections.precision import PrecisionConfig
from miles.config.sections.reward import RewardConfig
from miles.config.sections.rollout import RolloutConfig
from miles.config.sections.services import ServicesConfig
from miles.config.sections.telemetry import TelemetryConfig
from miles.config.sections.tls import TlsConfig
from miles.config.sections.train import TrainConfig
from miles.config.sections.weights import WeightsConfig

SECTIONS: Mapping[str, type[Section]] = {
    "services": ServicesConfig,
    "cluster": ClusterConfig,
    "data": DataConfig,
    "rollout": RolloutConfig,
    "reward": RewardConfig,
    "extensions": ExtensionsConfig,
    "eval": EvalConfig,
    "algorithm": AlgorithmConfig,
    "policy_loss": PolicyLossConfig,
    "distillation": DistillationConfig,
    "train": TrainConfig,
    "lora": LoraConfig,
    "megatron": MegatronConfig,
    "numerics": NumericsConfig,
    "architecture": ArchitectureConfig,
    "experts": ExpertsConfig,
    "attention": AttentionConfig,
    "moe": MoeConfig,
    "optimizer": OptimizerConfig,
    "weights": WeightsConfig,
    "precision": PrecisionConfig,
    "drafts": DraftsConfig,
    "checkpoint": CheckpointConfig,
    "telemetry": TelemetryConfig,
    "debug": DebugConfig,
    "fault_tolerance": FaultToleranceConfig,
    "gateway": GatewayConfig,
    "tls": TlsConfig,
}
"""Sections by their names in `JobConfig`, in the order of the reference page."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One field: its key in YAML and REST, its flag, and its meaning."""

    key: str
    flag: str
    section: str
    kind: type[Any]
    """bool, int, float, str, tuple or dict."""
    element: type[Any] | None
    """int or str for a tuple, else None."""
    choices: tuple[str, ...]
    metavar: str
    default: Any
    derived: str | None
    help: str
    negated: bool
    """Whether the flag turns the field off."""
    dotted_path: DottedPath | None
    """Set when the value names a Python object."""
    states: States | None
    """Set when the setting changes nothing and states what is so."""
    ignored: Ignored | None
    """Set when the setting changes nothing, whatever it says."""


@functools.cache
def catalog() -> Mapping[str, Entry]:
    """Return all fields by key, in the order of the sections."""
    return {
        key: _entry(section, key, field)
        for section, model in SECTIONS.items()
        for key, field in model.model_fields.items()
        if note(field, Passthrough) is None
    }


@functools.cache
def passthroughs() -> Mapping[str, tuple[str, str]]:
    """Return the section and field that collect keys with a prefix, by prefix."""
    found: dict[str, tuple[str, str]] = {}
    for section, model in SECTIONS.items():
        for key, field in model.model_fields.items():
            passthrough = note(field, Passthrough)
            if passthrough is not None:
                found[passthrough.prefix] = (section, key)
    return found


def _entry(section: str, key: str, field: FieldInfo) -> Entry:
    kind, allowed = base_type(field), choices(field)
    negated, metavar, source = note(field, Negated), note(field, Metavar), note(field, Derived)
    element = element_type(field) if kind is tuple else None
    default = field.get_default(call_default_factory=True)
    assert default is not PydanticUndefined, f"{key} has no default"
    return Entry(
        key=key,
        flag=negated.flag if negated else "--" + key.replace("_", "-"),
        section=section,
        kind=kind,
        element=element,
        choices=allowed,
        metavar=metavar.text if metavar else _metavar(kind, element, allowed),
        default=default,
        derived=source.source if source else None,
        help=" ".join((field.description or "").split()),
        negated=negated is not None,
        dotted_path=note(field, DottedPath),
        states=note(field, States),
        ignored=note(field, Ignored),
    )


def _metavar(kind: type[Any], element: type[Any] | None, allowed: tuple[str, ...]) -> str:
    if allowed:
        return "{" + ",".join(allowed) + "}"
    if element is not None:
        return "INT ..." if element is int else "TEXT ..."
    return {bool: "", int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON"}[kind]
