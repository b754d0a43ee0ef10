"""The configuration of a job: all sections, built from one flat object of settings."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from miles.config.checks.device import detect_device
from miles.config.rules import check
from miles.config.schema.catalog import SECTIONS, catalog, passthroughs
from miles.config.schema.derivation import derive
from miles.config.schema.faults import ConfigError, Fault, faults_of, unknown_name
from miles.config.schema.flat_settings import FlatSettings
from miles.config.schema.section import Section
from miles.config.sections.algorithm import AlgorithmConfig
from miles.config.sections.checkpoint import CheckpointConfig
from miles.config.sections.cluster import ClusterConfig
from miles.config.sections.data import DataConfig
from miles.config.sections.eval import EvalConfig
from miles.config.sections.extensions import ExtensionsConfig
from miles.config.sections.gateway import GatewayConfig
from miles.config.sections.lora import LoraConfig
from miles.config.sections.megatron import MegatronConfig
from miles.config.sections.optimizer import OptimizerConfig
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
    train: TrainConfig
    lora: LoraConfig
    megatron: MegatronConfig
    optimizer: OptimizerConfig
    weights: WeightsConfig
    checkpoint: CheckpointConfig
    telemetry: TelemetryConfig
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
        try:
            flat = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError([Fault("config", "", f"it is not JSON ({error})", "send a JSON object")]) from error
        if not isinstance(flat, dict):
            raise ConfigError(
                [Fault("config", flat, "it is not a JSON object", "send setting names with their values")]
            )
        return cls.from_flat(flat)

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
        """Fill in what depends on the machine: `device`, ranks per node, process group backend, $TENSORBOARD_DIR.

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


def examine(flat: Mapping[str, Any], refused: Collection[str] = ()) -> Examination:
    """Check a flat object and collect all faults: a fault of one field does not hide those of others.

    Keys that the caller has `refused` count as invalid, so that no rule uses them.
    """
    by_section, faults = _distribute(flat)
    sections: dict[str, Section] = {}
    invalid: set[str] = set(refused)
    for name, model in SECTIONS.items():
        sections[name], section_faults = _validate(model, by_section[name])
        faults += section_faults
        invalid |= {fault.field for fault in section_faults}
    given = {key for keys in by_section.values() for key in keys}
    settings = FlatSettings(_values(sections), given=given, invalid=invalid)
    faults += derive(settings)
    faults += check(settings)
    return Examination(sections, settings, faults)


def resolved(flat: Mapping[str, Any], device: Literal["cpu", "cuda"] | None = None) -> dict[str, Any]:
    """Fill in what depends on the machine where it is not given; see `JobConfig.resolve`."""
    asked = flat.get("device") or "auto"
    actual = asked if asked != "auto" else device or detect_device()
    on_cpu = actual == "cpu"
    depends: dict[str, int | str | None] = {
        "actor_num_gpus_per_node": 1 if on_cpu else 8,
        "distributed_backend": "gloo" if on_cpu else "nccl",
    }
    if flat.get("use_tensorboard"):
        depends["tb_project_name"] = os.environ.get("TENSORBOARD_DIR") or None
    return {**flat, "device": actual, **{key: flat.get(key) or value for key, value in depends.items()}}


def _distribute(flat: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[Fault]]:
    """Sort the keys of a flat object by section. Keys whose value is None count as not given."""
    known, prefixes = catalog(), passthroughs()
    by_section: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    faults = []
    for key, value in flat.items():
        if key in known:
            if value is not None:
                by_section[known[key].section][key] = value
            continue
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix) and key != prefix), None)
        if prefix is None:
            faults.append(unknown_name(key, "null" if value is None else value, known, "setting"))
        elif value is not None:
            section, field = prefixes[prefix]
            by_section[section].setdefault(field, {})[key.removeprefix(prefix)] = value
    return by_section, faults


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
