"""Groups of SGLang servers that differ, as `sglang_config` lists them: in GPUs, tensor-parallel size and flags.

The file (YAML or JSON) has one model with its `server_groups`:

    sglang:
      - name: actor
        server_groups:
          - {worker_type: regular, num_gpus: 4, num_gpus_per_engine: 1}
          - {worker_type: regular, num_gpus: 4, num_gpus_per_engine: 4, overrides: {mem_fraction_static: 0.7}}

Every rollout service gets an equal share of each group.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from miles.config.command.yaml_files import parse_yaml
from miles.config.schema.faults import ConfigError, Fault
from miles.config.sections.rollout import MAX_GPUS
from miles.config.sglang.taking import take

_ALIKE = (
    *("speculative", "stream_interval", "quantization", "enable_deterministic_inference", "preferred_sampling_params"),
    *("enable_custom_logit_processor", "dp_size", "enable_dp_attention", "pp_size"),
)
"""Flags, or their beginnings, that all servers of an engine have in common: it relies on them."""
_MODEL_KEYS = {"name", "model_path", "num_gpus_per_engine", "server_groups", "engine_groups", "update_weights"}
_GROUP_KEYS = {"worker_type", "num_gpus", "num_gpus_per_engine", "overrides"}
_OTHER_KINDS = {
    "prefill": "prefill and decode on different servers is not supported: each server does both",
    "decode": "prefill and decode on different servers is not supported: each server does both",
    "placeholder": "GPUs that no group asks for stay free without it",
}


READ = ("sglang_config", "rollout_num_gpus_per_engine", "rollout_num_workers", "rollout_num_gpus", "hf_checkpoint")
"""Settings that say which servers there are."""


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """One server to start."""

    gpus: int
    """Its tensor-parallel size."""
    flags: Mapping[str, Any]
    """SGLang's own flags by name, on top of those of all."""
    group: str = dataclasses.field(default="", compare=False)
    """The key of its group in the file; empty without one."""


def servers_of_service(flat: Mapping[str, Any]) -> tuple[Server, ...]:
    """Return the servers of each rollout service, in the order of their GPUs, by the settings that are `READ`.

    Raises ConfigError with every fault of the file.
    """
    size, services = flat["rollout_num_gpus_per_engine"], flat["rollout_num_workers"]
    if flat["sglang_config"] is None:
        gpus = flat["rollout_num_gpus"]
        return (Server(size, {}),) * (1 if gpus is None else gpus // size // services)
    faults: list[Fault] = []
    servers: list[Server] = []
    total = 0
    for group, count in _groups(flat, faults):
        servers += [group] * (count // services)
        total += count * group.gpus
        if count % services:
            problem = f"a group of {count} servers does not divide over rollout_num_workers = {services}"
            faults.append(_fault(flat, problem, "change its num_gpus, or set rollout_num_workers to 1"))
    asked = flat["rollout_num_gpus"]
    if not faults and asked is not None and asked != total:
        faults.append(Fault("rollout_num_gpus", asked, f"the groups of sglang_config have {total}", "leave it out"))
    if faults:
        raise ConfigError(faults)
    return tuple(servers)


def _groups(flat: Mapping[str, Any], faults: list[Fault]) -> Iterator[tuple[Server, int]]:
    """Yield a server of each group, and how many there are."""
    model = _model(flat, faults)
    groups = model.get("server_groups") or model.get("engine_groups") or []
    if model and not isinstance(groups, list):
        faults.append(_fault(flat, "its server_groups are no list", "list them"))
        return
    if model and not groups:
        faults.append(_fault(flat, "its model has no server_groups", "list them, each with worker_type and num_gpus"))
    for number, group in enumerate(groups):
        where = f"server_groups[{number}]"
        problems = list(_problems_of_group(group, where))
        if not problems:
            size: Any = group.get("num_gpus_per_engine") or model.get("num_gpus_per_engine")
            size = size or flat["rollout_num_gpus_per_engine"]
            if not _is_count(size) or group["num_gpus"] % size:
                problems.append(f"num_gpus of {where} are no multiple of num_gpus_per_engine = {size}")
        faults += [_fault(flat, problem, "correct it") for problem in problems]
        if not problems:
            yield Server(size, dict(group.get("overrides") or {}), where), group["num_gpus"] // size


def _model(flat: Mapping[str, Any], faults: list[Fault]) -> Mapping[str, Any]:
    path = flat["sglang_config"]
    try:
        content = parse_yaml(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        faults.append(_fault(flat, f"it cannot be read ({error.strerror})", "check the path"))
        return {}
    except (yaml.YAMLError, ValueError) as error:
        faults.append(_fault(flat, f"it is not YAML ({' '.join(str(error).split())})", "correct it"))
        return {}
    models = content.get("sglang") if isinstance(content, dict) else None
    if not isinstance(models, list) or not models or not all(isinstance(model, dict) for model in models):
        faults.append(_fault(flat, "it lists no model under the key sglang", "list one, with its server_groups"))
        return {}
    if len(models) > 1:
        names = ", ".join(str(model.get("name")) for model in models)
        problem = f"it has the models {names}, and a run serves the one that it trains"
        faults.append(_fault(flat, problem, "keep that one; score by another model in a reward service"))
        return {}
    model: Mapping[str, Any] = models[0]
    other = model.get("model_path")
    for key in sorted(model.keys() - _MODEL_KEYS):
        faults.append(_fault(flat, f"its model has a key {key} that is not known", "leave it out"))
    if model.get("update_weights") is False:
        faults.append(_fault(flat, "update_weights is false, and the model that is trained gets them", "leave it out"))
    if other is not None and other != flat["hf_checkpoint"]:
        problem = f"its model_path is {other}, and engines serve hf_checkpoint = {flat['hf_checkpoint']}"
        faults.append(_fault(flat, problem, "leave it out"))
    return model


def _problems_of_group(group: Any, where: str) -> Iterator[str]:
    if not isinstance(group, dict):
        yield f"{where} is no mapping"
        return
    kind, overrides = group.get("worker_type", "regular"), group.get("overrides") or {}
    if kind != "regular":
        yield f"worker_type of {where} is {kind}; {_OTHER_KINDS.get(kind, 'there is regular alone')}"
    if not _is_count(group.get("num_gpus")):
        yield f"num_gpus of {where} is {group.get('num_gpus')}, and a group has 1 GPU or more"
    for key in sorted(group.keys() - _GROUP_KEYS):
        yield f"{where} has a key {key} that is not known"
    if not isinstance(overrides, dict) or not all(isinstance(name, str) for name in overrides):
        yield f"overrides of {where} are no mapping of SGLang's flags"
        return
    for name, value in overrides.items():
        taken = take({name: value}, {}, "sglang_")
        if taken.faults:
            yield f"overrides of {where} have {taken.faults[0]}"
        elif taken.settings:
            yield f"the rollout service sets {name} of {where} itself (set {next(iter(taken.settings))})"
        elif any(key.startswith(_ALIKE) for key in taken.args):
            yield f"all servers have the same {name}, and {where} has its own; set it as sglang_{name}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_GPUS


def _fault(flat: Mapping[str, Any], problem: str, remedy: str) -> Fault:
    return Fault("sglang_config", flat["sglang_config"], problem, remedy)
