"""The processes of a run on one machine: name, command, environment, and the settings that each reads."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from miles.addresses import join_address, reachable_here, split_address
from miles.config.job import JobConfig
from miles.config.schema.catalog import catalog
from miles.cores import THREADS_VARIABLE, share_of, usable_cores
from miles.extensions.arguments import SETTINGS_VARIABLE, settings_text
from miles.launcher.placement import placement_of
from miles.launcher.torchrun import Node, torchrun
from miles.placement.deal import Placement
from miles.redis_url import REDIS_URL_VARIABLE

UNKNOWN_ADDRESS = "(known once started)"
"""Placeholder for an address that is known only once its service has started."""

_SECTIONS_READ: Mapping[str, tuple[str, ...]] = {
    "redis": (),
    "controller": ("data", "rollout", "eval", "reward", "distillation", "checkpoint", "telemetry", "debug"),
    "weightsync": ("weights",),
    "reward": ("reward",),
    "draft-trainer": ("drafts", "rollout", "weights"),
    "rollout": ("rollout", "reward", "distillation", "extensions", "lora", "weights", "precision", "drafts"),
    "gateway": ("gateway",),
    "trainer": (
        "cluster",
        "data",
        "rollout",
        "algorithm",
        "distillation",
        "extensions",
        "train",
        "lora",
        "megatron",
        "numerics",
        "moe",
        "optimizer",
        "weights",
        "precision",
        "drafts",
        "checkpoint",
        "telemetry",
        "debug",
    ),
}


DRAFT_TRAINER = "draft-trainer-0"
"""Name of the draft trainer."""
_TENSOR_KINDS = ("rollout", "trainer", "draft-trainer")
_MODULES = {"draft-trainer": "trainer.drafts"}
"""Of services whose kind is not their module."""
_DRAFT_THREADS_SHARE = 4
"""A draft trainer on the CPU gets one core of so many: the run does not wait for it."""

_KEEP_MEMORY = {"arena_max": 1, "mmap_max": 0, "trim_threshold": 1 << 40, "top_pad": 64 << 20, "hugetlb": 1}
"""Settings of glibc's malloc: one heap, which grows by 64 MiB, never returns memory, and asks for huge pages."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process to start."""

    name: str
    """Unique within the run, the same over restarts; also the worker id."""
    kind: str
    """redis, controller, weightsync, reward, rollout, trainer, draft-trainer or gateway."""
    command: tuple[str, ...]
    environment: Mapping[str, str]
    """Variables to set in addition to the inherited ones."""
    config: Mapping[str, Any]
    """The settings that the process reads, by key. A service gets the full configuration when a job starts on it."""
    node: int = 0
    """Number of the node it runs on; 0 is the launcher's."""


def plan_redis(config: JobConfig) -> ProcessPlan | None:
    """Plan the run's own Redis server; None when redis_url names another one."""
    if config.services.redis_url is not None:
        return None
    command = ("redis-server", "--dir", f"{config.services.run_dir}/redis", "--appendonly", "yes")
    return _plan(config, "redis", "redis", (*command, "--maxmemory-policy", "noeviction"))


def plan_controller(config: JobConfig, redis_url: str) -> ProcessPlan:
    """Plan the controller."""
    arguments = ("--listen", _listen(config, "controller_port"))
    logs = ("--log-dir", f"{config.services.run_dir}/logs")
    plan = _plan(config, "controller", "controller", (*_module("controller"), *logs, *arguments))
    return dataclasses.replace(plan, environment={**plan.environment, REDIS_URL_VARIABLE: redis_url})


def plan_gateway(config: JobConfig, controller: str) -> ProcessPlan | None:
    """Plan the gateway; None when it is turned off."""
    gateway = config.gateway
    if not gateway.gateway:
        return None
    command = [
        sys.executable,
        "-m",
        "miles.gateway",
        "--listen",
        join_address(gateway.gateway_host, gateway.gateway_port),
    ]
    command += ["--controller", controller, "--runs-dir", str(pathlib.Path(config.services.run_dir).parent)]
    if gateway.gateway_keys_file is not None:
        command += ["--keys-file", gateway.gateway_keys_file]
    for root in gateway.gateway_allowed_root or (".",):
        command += ["--allowed-root", root]
    for module in gateway.gateway_allowed_module:
        command += ["--allowed-module", module]
    return _plan(config, "gateway", "gateway", tuple(command))


def plan_workers(
    config: JobConfig, controller: str, *, any_job: bool = False, placement: Placement | None = None
) -> list[ProcessPlan]:
    """Plan every process of this machine that attaches to the controller; `elsewhere.py` plans those of others.

    Args:
        config: resolved for a device.
        controller: host:port of the controller.
        any_job: be ready for later jobs, whatever they ask for: all built-in rewards, and drafts to train.
        placement: who gets which GPUs; None: as they are dealt on this machine.
    """
    weightsync = _weightsync_flags(config)
    plans = [_worker(config, "weightsync", "weightsync", "weightsync_port", controller, extra=weightsync)]
    if config.reward.scored_here and config.debug.has_engines:
        every_reward = any_job and config.reward.custom_rm_path is None
        flags = [] if every_reward else _reward_flags(config)
        plans.append(_worker(config, "reward-0", "reward", "reward_port", controller, extra=flags))
    placement = placement or placement_of(config)
    for i in range(rollouts_here(config)):
        extra = [*_rollout_device(config, i, placement), *engine_addresses(config, i)]
        plan = _worker(config, f"rollout-{i}", "rollout", "rollout_port", controller, offset=i, extra=extra)
        plans.append(dataclasses.replace(plan, node=placement.rollouts[i].node if placement is not None else 0))
    if config.debug.has_trainer:
        plans.append(_trainer(config, controller))
    if config.drafts.enable_draft_training or any_job:
        plans.append(_draft_trainer(config, controller))
    return plans


def plan_run(config: JobConfig, placement: Placement | None = None) -> list[ProcessPlan]:
    """Plan all processes, in the order in which they start, with placeholders for addresses that are not known yet."""
    redis = plan_redis(config)
    controller = plan_controller(config, config.services.redis_url or UNKNOWN_ADDRESS)
    address = controller_address(config)
    gateway = plan_gateway(config, address)
    return [
        *([redis] if redis else []),
        controller,
        *plan_workers(config, address, placement=placement),
        *([gateway] if gateway else []),
    ]


def controller_address(config: JobConfig) -> str:
    """Return the controller's host:port, or a placeholder for one whose port is picked at its start."""
    port = config.services.controller_port
    return join_address(config.services.host, port) if port else UNKNOWN_ADDRESS


def _worker(
    config: JobConfig, name: str, kind: str, port: str, controller: str, *, offset: int = 0, extra: Sequence[str] = ()
) -> ProcessPlan:
    listen = ("--listen", _listen(config, port, offset), "--controller", controller, "--worker-id", name)
    return _plan(config, name, kind, (*_module(kind), *listen, *extra))


def _trainer(config: JobConfig, controller: str) -> ProcessPlan:
    """Plan the trainer: one process, or torchrun with one per rank, which ends all ranks when one of them ends."""
    plan = _worker(config, "trainer-0", "trainer", "trainer_port", controller, extra=trainer_flags(config))
    if config.cluster.trainer_world_size > 1:
        plan = dataclasses.replace(plan, command=torchrun(trainer_node(config, 0), plan.command[1:]))
    return dataclasses.replace(
        plan, environment={**plan.environment, **config.train.train_env_vars, **tls_environment(config)}
    )


def _draft_trainer(config: JobConfig, controller: str) -> ProcessPlan:
    """Plan the draft trainer, which is on this machine wherever else the trainer is."""
    device = config.drafts.draft_train_device
    flags = ("--device", "cpu" if config.services.device == "cpu" else device)
    return _worker(config, DRAFT_TRAINER, "draft-trainer", "", controller, extra=flags)


def trainer_flags(config: JobConfig) -> list[str]:
    """Return the flags of all of the trainer's ranks."""
    cluster = config.cluster
    return [
        *("--device", config.services.device),
        *("--distributed-backend", str(cluster.distributed_backend)),
        *("--distributed-timeout-minutes", str(cluster.distributed_timeout_minutes)),
        *("--rank-timeout-s", f"{cluster.rank_timeout_s:g}"),
    ]


def trainer_node(config: JobConfig, rank: int) -> Node:
    """Return one of the trainer's nodes. Node 0 is this machine, which serves the rendezvous."""
    port = config.services.trainer_master_port or UNKNOWN_ADDRESS
    host = split_address(reachable_here(join_address(config.services.host, 0)))[0]
    master = join_address(host, 0).removesuffix("0") + str(port)
    return Node(rank, config.cluster.actor_num_nodes, _local_ranks(config), master)


def rollouts_here(config: JobConfig) -> int:
    """Return the number of rollout services that this machine runs."""
    if not config.debug.has_engines:
        return 0
    return config.cluster.rollout_num_workers - config.cluster.rollout_workers_elsewhere


def _local_ranks(config: JobConfig) -> int:
    return config.cluster.trainer_world_size // config.cluster.actor_num_nodes


def _rollout_device(config: JobConfig, index: int, placement: Placement | None) -> list[str]:
    """Return the flags of a service's GPUs; of one whose engines run elsewhere, the first GPU for what it stages."""
    if placement is None:
        return ["--device", config.services.device]
    gpus = placement.rollouts[index].gpus
    return ["--device", f"cuda:{gpus[0] if gpus else 0}", "--num-gpus", str(len(gpus))]


def engine_addresses(config: JobConfig, index: int) -> list[str]:
    """Return the external engines of one rollout service; they are distributed round-robin."""
    addresses = (config.rollout.rollout_external_engine_addrs or ())[index :: config.cluster.rollout_num_workers]
    return ["--engine-addrs", *addresses] if addresses else []


def _weightsync_flags(config: JobConfig) -> list[str]:
    flags = [
        "--state-dir",
        f"{config.services.run_dir}/weightsync",
        "--serving-lease-s",
        f"{config.weights.weight_lease_s:g}",
    ]
    if config.weights.update_weight_disk_dir is not None:
        flags += ["--disk-dir", config.weights.update_weight_disk_dir]
    return flags


def _reward_flags(config: JobConfig) -> list[str]:
    reward = config.reward
    if reward.rm_type and config.eval.eval_config is None:
        return ["--rewards", reward.rm_type]
    if not reward.custom_rm_path:
        return []  # all: rows or data sets name theirs
    return ["--custom-rm-path", reward.custom_rm_path, *(["--group-rm"] if reward.group_rm else [])]


def _listen(config: JobConfig, port_key: str, offset: int = 0) -> str:
    port = getattr(config.services, port_key) if port_key else 0
    return join_address(config.services.host, port + offset if port else 0)


def _module(kind: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"miles.services.{_MODULES.get(kind, kind)}")


def _plan(config: JobConfig, name: str, kind: str, command: tuple[str, ...]) -> ProcessPlan:
    flat = config.to_flat()
    read = {key: flat[key] for key, entry in catalog().items() if entry.section in _SECTIONS_READ[kind]}
    environment = tls_environment(config) if kind != "redis" else {}
    if kind in _TENSOR_KINDS and config.services.device == "cpu":
        environment |= cpu_memory_environment()
    if kind == "reward" and config.reward.custom_rm_path is not None:
        environment |= {SETTINGS_VARIABLE: settings_text(flat)}
    environment |= _thread_environment(config, kind)
    return ProcessPlan(name, kind, command, environment, read)


def _thread_environment(config: JobConfig, kind: str) -> dict[str, str]:
    """Return variables that divide this machine's cores among processes; none where the user has set them.

    Processes of one kind compute at the same time, so they share the cores. Trainer and engines do not share with each
    other: they take turns or, in an asynchronous run, one waits for the other most of the time, and the slower one
    should have every core. The reward service has a worker process per core. Nobody waits for the draft trainer.
    """
    if THREADS_VARIABLE in os.environ:
        return {}
    at_once = {
        "trainer": _local_ranks(config),
        "rollout": rollouts_here(config),
        "reward": usable_cores(),
        "draft-trainer": _DRAFT_THREADS_SHARE,
    }
    return {THREADS_VARIABLE: str(share_of(usable_cores(), at_once[kind]))} if kind in at_once else {}


def cpu_memory_environment() -> dict[str, str]:
    """Return variables that make a process keep the memory of freed tensors; none where the user has set them.

    Otherwise the kernel allocates and zeroes the pages of every large tensor anew, which takes a third of a small
    model's training step. It makes no difference for tensors on a GPU.
    """
    if "GLIBC_TUNABLES" in os.environ:
        return {}
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in _KEEP_MEMORY.items())}


def tls_environment(config: JobConfig) -> dict[str, str]:
    """Return the variables that encrypt a process's gRPC connections as configured."""
    tls = config.tls
    named = {"CERT": tls.tls_cert, "KEY": tls.tls_key, "CA": tls.tls_ca, "MUTUAL": "1" if tls.tls_mutual else None}
    return {f"MILES_TLS_{name}": value for name, value in named.items() if value is not None}
