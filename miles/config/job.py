"""The configuration of a job: all sections, built from one flat object of settings."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from miles.config.backends import choose_backends
from miles.config.checks.device import detect_device
from miles.config.checks.own_address import own_address
from miles.config.distribution import Distribution, distribute
from miles.config.notes.registry import Note
from miles.config.rules import check
from miles.config.rules.nodes import reached_by_others
from miles.config.schema.catalog import SECTIONS, catalog, passthroughs
from miles.config.schema.derivation import derive
from miles.config.schema.faults import ConfigError, Fault, faults_of, show
from miles.config.schema.flat_settings import FlatSettings
from miles.config.schema.precision_variables import not_given
from miles.config.schema.section import Section
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
from miles.precision.number_types import AUTO


class JobConfig(BaseModel):
    """All settings of a job, checked against each other. Immutable.

    Outside the process a configuration is one flat object whose keys are the field names of all sections; the command
    line, YAML files and REST bodies have the same keys. None means that a key is not given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    services: ServicesConfig
    cluster: ClusterConfig
    data: DataConfig
    rollout: RolloutConfig
    reward: RewardConfig
    extensions: ExtensionsConfig
    eval: EvalConfig
    algorithm: AlgorithmConfig
    policy_loss: PolicyLossConfig
    distillation: DistillationConfig
    train: TrainConfig
    lora: LoraConfig
    megatron: MegatronConfig
    numerics: NumericsConfig
    architecture: ArchitectureConfig
    experts: ExpertsConfig
    attention: AttentionConfig
    moe: MoeConfig
    optimizer: OptimizerConfig
    weights: WeightsConfig
    precision: PrecisionConfig
    drafts: DraftsConfig
    checkpoint: CheckpointConfig
    telemetry: TelemetryConfig
    debug: DebugConfig
    fault_tolerance: FaultToleranceConfig
    gateway: GatewayConfig
    tls: TlsConfig

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Self:
        """Check a flat object, derive what is not given, and build the configuration.

        Looks at nothing else: `check_environment` checks files and ports. Raises ConfigError with every fault.
        """
        examination = examine(flat)
        if examination.faults:
            raise ConfigError(examination.faults)
        settings = examination.settings
        complete: dict[str, Any] = {
            name: section.model_copy(update=settings.of(section)) for name, section in examination.sections.items()
        }
        return cls(**complete)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Do the same with JSON text, such as a request's body. Raises ConfigError if it is not a JSON object."""
        return cls.from_flat(_json_object(text))

    @classmethod
    def from_json_here(cls, text: str | bytes) -> Self:
        """Do the same, resolved for this machine: with the backends that it has where none are named."""
        return cls.from_flat(resolved(_json_object(text)))

    def to_flat(self) -> dict[str, Any]:
        """Return every key with its value, in JSON types only; `from_flat` rebuilds an equal configuration."""
        flat = {key: _plain(getattr(getattr(self, entry.section), key)) for key, entry in catalog().items()}
        for prefix, (section, field) in passthroughs().items():
            flat |= {prefix + name: value for name, value in getattr(getattr(self, section), field).items()}
        return flat

    def replace(self, **changes: Any) -> Self:
        """Return the configuration with some keys changed, checked again. Raises ConfigError."""
        return type(self).from_flat(self.to_flat() | changes)

    def resolve(self, device: Literal["cpu", "cuda"] | None = None) -> Self:
        """Fill in what depends on the machine: `device`, ranks per node, process group backend, folders of trackers.

        Backends are settled already: `resolved` chooses them for a machine before the configuration is built.

        Args:
            device: What `auto` means; None looks at this machine.

        Raises ConfigError when the result is inconsistent, e.g. when a batch does not divide over the ranks.
        """
        return type(self).from_flat(resolved(self.to_flat(), device))

    def with_types(self, *keys: str) -> Self:
        """Return the configuration itself, for a worker that computes in the number types of these settings.

        Raises ConfigError while one is `auto`: the controller decides them once per run, by the speed of its workers.
        """
        flat = self.to_flat()
        problem, remedy = "it is decided when a run starts, before its workers are", "name a type"
        faults = [Fault(key, AUTO, problem, remedy) for key in keys if flat[key] == AUTO]
        if faults:
            raise ConfigError(faults)
        return self

    def rollouts(self, dataset_size: int) -> int:
        """Return the rollouts of the run: num_rollout, or the full batches in num_epoch passes over the data set."""
        if self.data.num_rollout is not None:
            return self.data.num_rollout
        assert self.data.num_epoch is not None, "a rule requires one of the two"
        return self.data.num_epoch * dataset_size // self.data.rollout_batch_size


@dataclasses.dataclass(frozen=True, slots=True)
class Examination:
    """A flat object by section, with its derived settings and its faults."""

    sections: Mapping[str, Section]
    settings: FlatSettings
    faults: Sequence[Fault]
    notes: Sequence[Note] = ()
    """What became of keys that are no settings here, but are taken."""


def examine(flat: Mapping[str, Any], refused: Collection[str] = ()) -> Examination:
    """Check a flat object and collect all faults: a fault of one field does not hide those of others.

    Keys that the caller has `refused` count as invalid, so that no rule uses them.
    """
    sections, settings, distribution = _read(flat, refused)
    faults = [*distribution.faults, *derive(settings)]
    faults += check(settings)
    return Examination(sections, settings, faults, tuple(distribution.notes))


@dataclasses.dataclass(frozen=True, slots=True)
class Resolution:
    """A flat object with what depends on the machine."""

    flat: dict[str, Any]
    chosen: Sequence[str]
    """What was chosen among alternatives, each with the reason, as a line."""


def resolved(flat: Mapping[str, Any], device: Literal["cpu", "cuda"] | None = None) -> dict[str, Any]:
    """Fill in what depends on the machine where it is not given: backends, and the rest of `JobConfig.resolve`."""
    return resolution(flat, device).flat


def resolution(flat: Mapping[str, Any], device: Literal["cpu", "cuda"] | None = None) -> Resolution:
    """Do the same, and say what was chosen."""
    asked = flat.get("device") or "auto"
    actual = asked if asked != "auto" else device or detect_device()
    on_cpu = actual == "cpu"
    depends: dict[str, int | str | None] = {
        "actor_num_gpus_per_node": 1 if on_cpu else 8,
        "distributed_backend": "gloo" if on_cpu else "nccl",
    }
    if flat.get("use_tensorboard"):
        depends["tb_project_name"] = os.environ.get("TENSORBOARD_DIR") or None
    if flat.get("use_mlflow"):
        depends["mlflow_tracking_uri"] = os.environ.get("MLFLOW_TRACKING_URI") or None
    complete = {**flat, "device": actual, **{key: flat.get(key) or value for key, value in depends.items()}}
    _, settings, _ = _read(complete)
    asked = not_given(settings, os.environ)
    complete |= {each.key: each.value for each in asked}
    choices = list(choose_backends(settings, "cpu" if on_cpu else "cuda"))
    chosen = [str(choice) for choice in choices]
    complete |= {choice.key: choice.value for choice in choices}
    chosen += [f"{each.key} = {show(each.value)}: {each.variable} is set in the environment" for each in asked]
    if flat.get("host") is None and reached_by_others(settings) and (address := own_address()) is not None:
        complete["host"] = address
        chosen.append(f"host = {address}: services on other machines reach this one there, by its default route")
    return Resolution(complete, chosen)


def _read(
    flat: Mapping[str, Any], refused: Collection[str] = ()
) -> tuple[dict[str, Section], FlatSettings, Distribution]:
    """Read the values of a flat object, each by itself; their faults are added to those of the keys."""
    distribution = distribute(flat)
    by_section, faults = distribution.by_section, distribution.faults
    sections: dict[str, Section] = {}
    invalid: set[str] = set(refused)
    for name, model in SECTIONS.items():
        sections[name], section_faults = _validate(model, by_section[name])
        faults += section_faults
        invalid |= {fault.field for fault in section_faults}
    given = {key for keys in by_section.values() for key in keys}
    return sections, FlatSettings(_values(sections), given=given, invalid=invalid), distribution


def _json_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ConfigError."""
    try:
        flat = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError([Fault("config", "", f"it is not JSON ({error})", "send a JSON object")]) from error
    if not isinstance(flat, dict):
        raise ConfigError([Fault("config", flat, "it is not a JSON object", "send setting names with their values")])
    return flat


def _validate(model: type[Section], given: Mapping[str, Any]) -> tuple[Section, list[Fault]]:
    """Build a section; invalid fields are reported and keep their defaults."""
    try:
        return model(**given), []
    except ValidationError as error:
        faults = faults_of(error)
        wrong = {fault.field for fault in faults}
        return model(**{key: value for key, value in given.items() if key not in wrong}), faults


def _values(sections: Mapping[str, Section]) -> dict[str, Any]:
    return {key: getattr(section, key) for section in sections.values() for key in type(section).model_fields}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, dict) else value
