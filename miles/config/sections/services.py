"""The run's name and folder, where its services listen, and on what they compute."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Derived, Metavar, Port, PositiveFloat, Section, derived


class ServicesConfig(Section):
    """Names, addresses and the device."""

    name: str = "miles"
    """Name of the run, for people; its folder is named after it."""

    run_dir: Annotated[str, Derived("runs/NAME"), Metavar("DIR")] = derived()
    """Folder of everything the run writes: logs, metrics, checkpoints."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What trainer and engines compute on; `auto` is CUDA where there is a GPU that PyTorch can use."""

    host: str = "127.0.0.1"
    """Address on which every service listens."""

    redis_url: Annotated[str | None, Derived("a server of the run's own"), Metavar("URL")] = None
    """Redis that holds queue, leases and job records: redis://, rediss:// or unix://."""

    controller_port: Port = 0
    """Port of the controller; 0 picks a free one."""

    weightsync_port: Port = 0
    """Port of the weight-sync service; 0 picks a free one."""

    trainer_port: Port = 0
    """Port of the trainer's rank 0; 0 picks a free one."""

    reward_port: Port = 0
    """Port of the built-in reward service; 0 picks a free one."""

    rollout_port: Port = 0
    """Port of the first rollout service, the others count up from it; 0 picks free ones."""

    stop_timeout: PositiveFloat = 120.0
    """How long train.py waits after Ctrl-C for the run to come to a stop, in seconds; what hangs longer is given up and
    the run ends without saving. Writing the checkpoint does not count: it has 30 minutes of its own."""

    chaos: Annotated[int | None, Metavar("SEED")] = None
    """A drill: kill -9 services of the run, Redis included, one by one or all at once, at moments that follow from this
    seed, and print how long each takes to come back. The run must end as it would have without."""

    chaos_interval_s: PositiveFloat = 30.0
    """Mean time in a drill from one recovery to the next kill, in seconds. Leave time for a checkpoint in between."""
