"""Rules about services: names, addresses, ports, devices, function paths, transports."""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles.addresses import why_not_host
from miles.config.rules.registry import needs, rule
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.redis_url import why_not_redis_url

_PORTS = ("controller_port", "weightsync_port", "trainer_port", "trainer_master_port", "reward_port", "gateway_port")
_LONGEST_NAME = 200
"""Characters of a folder's name that file systems take, with room for what is appended."""

_COMPONENTS = ("rollout", "train")


@rule
def name_can_be_a_folder(s: FlatSettings) -> Iterator[Fault]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", s.name):
        yield Fault(
            "name", s.name, "the run's folder is named after it", "use letters, digits, dots, dashes, underscores"
        )


@rule
def name_fits_into_a_folder(s: FlatSettings) -> Iterator[Fault]:
    if len(s.name) > _LONGEST_NAME:
        problem = f"the run's folder is named after it, and {len(s.name)} characters are too many"
        yield Fault("name", s.name, problem, f"use at most {_LONGEST_NAME}")


@rule
def redis_url_is_an_address(s: FlatSettings) -> Iterator[Fault]:
    if s.redis_url is not None and (problem := why_not_redis_url(s.redis_url)) is not None:
        yield Fault("redis_url", s.redis_url, problem, "write it like redis://host:6379/0")


@rule
def host_is_a_host(s: FlatSettings) -> Iterator[Fault]:
    if (problem := why_not_host(s.host)) is not None:
        yield Fault("host", s.host, problem, "give a name or address of this machine")


@rule
def ports_are_apart(s: FlatSettings) -> Iterator[Fault]:
    taken: dict[int, str] = {}
    for key in _PORTS:
        port = getattr(s, key)
        if port in taken:
            yield Fault(key, port, f"{taken[port]} is the same", "give each service a port of its own, or 0")
        if port:
            taken[port] = key
    last = s.rollout_port + s.rollout_num_workers - 1
    if s.rollout_port and last > 65535:
        problem = f"rollout_num_workers = {s.rollout_num_workers} services would need ports up to {last}"
        yield Fault("rollout_port", s.rollout_port, problem, "lower it, or set it to 0")
    for port, key in taken.items():
        if s.rollout_port and s.rollout_port <= port <= last:
            problem = f"rollout services listen on {s.rollout_port} to {last}"
            yield Fault(key, port, problem, "give each service a port of its own, or 0")


@rule
def process_group_fits_the_device(s: FlatSettings) -> Iterator[Fault]:
    if s.distributed_backend == "nccl" and s.device == "cpu":
        yield Fault(
            "distributed_backend", "nccl", "device = cpu and NCCL needs GPUs", "set it to gloo, or leave it out"
        )


@rule
def dotted_paths_are_well_formed(s: FlatSettings) -> Iterator[Fault]:
    for key, entry in catalog().items():
        if entry.dotted_path is None:
            continue
        path = getattr(s, key)
        if path is not None and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", path):
            yield Fault(key, path, "it must name a module and something in it", "write it like package.module.name")


@rule
def restarted_components_have_known_names(s: FlatSettings) -> Iterator[Fault]:
    for name in s.ft_components:
        if name not in _COMPONENTS:
            problem = f"the parts that can be named are {' and '.join(_COMPONENTS)}"
            yield Fault("ft_components", name, problem, "leave it out: everything is restarted")


@rule
def settings_of_trackers_need_their_tracker(s: FlatSettings) -> Iterator[Fault]:
    for key in ("tb_project_name", "tb_experiment_name"):
        yield from needs(s, key, "use_tensorboard")
    for key in ("wandb_mode", "wandb_run_id", "wandb_run_name"):
        yield from needs(s, key, "use_wandb")
    for key, entry in catalog().items():
        if entry.section == "telemetry" and key.startswith("mlflow_"):
            yield from needs(s, key, "use_mlflow")


@rule
def changes_of_weights_have_a_folder(s: FlatSettings) -> Iterator[Fault]:
    if s.update_weight_transfer_mode == "disk_delta" and s.update_weight_disk_dir is None:
        problem = "update_weight_disk_dir is not set"
        yield Fault(
            "update_weight_transfer_mode", "disk_delta", problem, "set it to a folder that all hosts share, or use auto"
        )


@rule
def gpu_memory_is_shared_on_gpus(s: FlatSettings) -> Iterator[Fault]:
    if s.update_weight_transfer_mode == "cuda_ipc" and s.device == "cpu":
        yield Fault("update_weight_transfer_mode", "cuda_ipc", "device is cpu", "use auto, or broadcast")
