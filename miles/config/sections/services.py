"""The run's name, folder, addresses and device."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Derived, Metavar, Port, PositiveFloat, Section, derived


class ServicesConfig(Section):
    """Names, addresses and the device."""

    name: str = "miles"
    """Name of the run and of its folder."""

    run_dir: Annotated[str, Derived("runs/NAME"), Metavar("DIR")] = derived()
    """Folder for all files of the run: logs, metrics, checkpoints."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of trainer and engines; `auto` is CUDA where PyTorch can use a GPU."""

    host: str = "127.0.0.1"
    """Address that every service listens on. With services on other machines it is this machine's address on its
    default route, unless one is given."""

    redis_url: Annotated[str | None, Derived("a server of the run's own"), Metavar("URL")] = None
    """Redis server for queue, leases and job records: redis://, rediss:// or unix://."""

    controller_port: Port = 0
    """Port of the controller; 0 picks a free one."""

    weightsync_port: Port = 0
    """Port of the weight-sync service; 0 picks a free one."""

    trainer_port: Port = 0
    """Port of the trainer's rank 0; 0 picks a free one."""

    trainer_master_port: Port = 0
    """Port of the rendezvous of the trainer's ranks; 0 picks a free one. With several nodes, one that is set lets the
    commands of the other nodes be known before."""

    reward_port: Port = 0
    """Port of the built-in reward service; 0 picks a free one."""

    rollout_port: Port = 0
    """Port of the first rollout service, with consecutive ports for the others; 0 picks free ones."""

    stop_timeout: PositiveFloat = 120.0
    """Time that train.py waits after Ctrl-C for the run to stop, in seconds, before it ends without saving; writing the
    checkpoint does not count and has its own limit of 30 minutes."""

    chaos: Annotated[int | None, Metavar("SEED")] = None
    """Run a recovery drill with this seed: kill services of the run, including Redis, one by one or all at once, at
    random moments, and print how long each takes to recover."""

    chaos_interval_s: PositiveFloat = 30.0
    """Mean time in a drill between a recovery and the next kill, in seconds; leave time for a checkpoint in between."""
