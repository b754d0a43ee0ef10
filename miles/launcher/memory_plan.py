"""What `miles plan memory` plans: a configuration of which little but the model need be said."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from miles.config.checks.gpus import demand_of, gpu_faults
from miles.config.checks.json_file import read_json_object
from miles.config.checks.model import model_faults
from miles.config.command.flags import CommandLine
from miles.config.job import JobConfig, examine, resolution
from miles.config.rules.precision import precision_file_faults
from miles.config.schema.faults import ConfigError, Fault, RunFault
from miles.config.schema.flat_settings import FlatSettings
from miles.launcher.run_plan import RunPlan
from miles.memory.model import shape_of
from miles.placement.nodes import Cluster, parse_cluster

_NO_MATTER: Mapping[str, Any] = {"prompt_data": "prompts.jsonl", "num_rollout": 1}
"""Settings that a run needs and its memory does not depend on."""
_AS_TRAINED: dict[str, Any] = {
    "fp8_format": None, "fp8_recipe": None, "fp4_format": None, "fp4_recipe": None, "int4_qat": False,
    "rollout_weight_format": "as_trained",
}  # fmt: skip
PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "bf16": {"train_dtype": "bfloat16", "rollout_dtype": "bfloat16"},
    "fp8": {"fp8_format": "e4m3", "fp8_recipe": "blockwise", "rollout_weight_format": "fp8_block"},
    "fp8_rollout": {"rollout_weight_format": "fp8_block"},
    "int4": {"int4_qat": True, "rollout_weight_format": "int4"},
    "int4_all": {"int4_qat": True, "rollout_weight_format": "int4", "int4_layers": (".",)},
}
"""Settings by what --precision takes, in place of those that a configuration has."""
_NODE = 8
"""GPUs of a node of which nothing is said."""


def memory_plan(line: CommandLine, precision: str | None, scratch: pathlib.Path) -> RunPlan:
    """Return the plan of a command line. Raises ConfigError.

    Args:
        precision: a key of PRECISIONS; None: what the settings say.
        scratch: an empty folder, for a config.json that is not in one of its own.
    """
    flat = {**_NO_MATTER, **{key: value for key, value in line.flat.items() if value is not None}}
    if not flat.get("hf_checkpoint"):
        raise ConfigError(
            [Fault("hf_checkpoint", None, "the estimate is of a model", "give a model's folder, or its config.json")]
        )
    flat["hf_checkpoint"] = str(_folder(pathlib.Path(str(flat["hf_checkpoint"])), scratch))
    if precision is not None:
        flat |= {**_AS_TRAINED, **PRECISIONS[precision]}
        if precision == "int4" and not _has_experts(flat["hf_checkpoint"]):
            flat |= PRECISIONS["int4_all"]
    on_cpu = flat.get("device") == "cpu"
    found = resolution(flat, "cpu" if on_cpu else "cuda")
    examination = examine(found.flat)
    faults = line.merge(examination.faults)
    if faults := faults or list(precision_file_faults(examination.settings)):
        raise ConfigError(faults)
    cluster = None if on_cpu else line.assumed or _large_enough(examination.settings)
    if cluster is not None and (faults := _no_room(examination.settings, cluster)):
        raise ConfigError(faults)
    missing = tuple(fault for fault in model_faults(examination.settings) if not isinstance(fault, RunFault))
    return RunPlan(JobConfig.from_flat(found.flat), cluster, missing, tuple(found.chosen))


def _folder(named: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """Return a folder with the config.json that is named, by itself or by its folder."""
    file = named / "config.json" if named.is_dir() else named
    if not file.is_file():
        raise ConfigError(
            [Fault("hf_checkpoint", str(named), f"there is no {file}", "give a config.json or its folder")]
        )
    if shape_of(read_json_object(file)) is None:
        problem = "it does not say the sizes of a decoder, or not in a form that is known"
        raise ConfigError([Fault("hf_checkpoint", str(named), problem, "give a causal language model's config.json")])
    if file.name == "config.json":
        return file.parent
    shutil.copyfile(file, scratch / "config.json")
    return scratch


def _has_experts(folder: str) -> bool:
    shape = shape_of(read_json_object(pathlib.Path(folder) / "config.json"))
    return shape is not None and shape.experts > 0


def _no_room(settings: FlatSettings, cluster: Cluster) -> list[Fault]:
    return [fault for fault in gpu_faults(settings, cluster) if not isinstance(fault, RunFault)]


def _large_enough(settings: FlatSettings) -> Cluster:
    """Return as many nodes of 8 large GPUs as the run asks for, the trainer's first."""
    demand = demand_of(settings, Cluster((), assumed=True))
    gpus = max(_NODE, demand.trainer_gpus, demand.service_gpus)
    services = 0 if demand.colocate or not demand.service_gpus else -(-demand.services // (gpus // demand.service_gpus))
    return parse_cluster(",".join([str(gpus)] * max(1, demand.trainer_nodes + services)))
