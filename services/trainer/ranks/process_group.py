"""The process group of all ranks, and the device of this one."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from miles.algorithms.any_shape_attention import leave_out_cudnn
from miles.config.checks.device import detect_device
from miles.services.trainer.ranks.connections import RankConnections, connect_ranks
from miles.services.trainer.ranks.network import choose_interfaces


def join(
    device_name: str,
    backend: str | None,
    timeout_minutes: float,
    silence_s: float | None = None,
    on_lost: Callable[[str], None] = lambda lost: None,
) -> tuple[torch.device, RankConnections]:
    """Choose this rank's device and make the process group; without torchrun it has this process alone.

    Also returns this rank's connections, which are there before the group: a rank that is lost while the group is made
    would keep the others waiting. `on_lost` is called, from a thread, when a rank is lost. Without `silence_s` ranks
    are not connected.
    """
    name = detect_device() if device_name == "auto" else device_name
    device = torch.device(name)
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        leave_out_cudnn()
    backend = backend or ("nccl" if name == "cuda" else "gloo")
    kinds = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        dist.init_process_group(kinds, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return device, RankConnections({}, 0.0, on_lost)
    choose_interfaces(os.environ)
    store, rank, count = next(rendezvous("env://", timeout=timeout))
    connections = RankConnections({}, 0.0, on_lost)
    if silence_s is not None:
        connections = connect_ranks(
            store,
            rank,
            count,
            os.environ["MASTER_ADDR"],
            silence_s=silence_s,
            deadline_s=timeout.total_seconds(),
            on_lost=on_lost,
        )
    dist.init_process_group(kinds, store=store, rank=rank, world_size=count, timeout=timeout)
    return device, connections
