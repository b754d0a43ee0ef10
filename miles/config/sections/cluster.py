"""The number of processes of a run, and the trainer's process group."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Derived, NonNegative, Positive, PositiveFloat, Section, derived


class ClusterConfig(Section):
    """Processes and devices."""

    actor_num_nodes: Positive = 1
    """Number of nodes of the trainer. This machine is the first; `miles trainer-node` runs on each of the others."""

    actor_num_gpus_per_node: Annotated[Positive | None, Derived("8 on CUDA, 1 on CPU")] = None
    """Number of trainer processes per node, with one GPU each, or none on the CPU."""

    rollout_num_workers: Positive = 1
    """Number of rollout services, with one inference engine each."""

    num_gpus_per_node: Positive | None = None
    """Maximum number of GPUs of each node that rollouts get; not given means all that the trainer leaves, or, with
    colocate, all of the trainer's."""

    rollout_workers_elsewhere: NonNegative = 0
    """How many of them are started by hand on other machines; the others run on this one."""

    colocate: bool = False
    """Run trainer and engines on the same GPUs: in turns, or at once when offload_rollout and offload_train are off."""

    offload_rollout: Annotated[bool, Derived("on with colocate")] = derived()
    """Release the engines' memory (weights, KV cache) while the trainer works."""

    offload_train: Annotated[bool | None, Derived("on with colocate where the trainer has GPUs")] = None
    """Move the trainer's weights, gradients and optimizer to pinned host memory while the engines work, and back for
    each step. On a CPU it takes the same turns and frees nothing."""

    offload: bool = False
    """Same as offload_train and offload_rollout."""

    distributed_backend: Annotated[Literal["nccl", "gloo"] | None, Derived("nccl on CUDA, gloo on CPU")] = None
    """Backend of the trainer's process group."""

    distributed_timeout_minutes: Positive = 10
    """Timeout of the trainer's collectives, in minutes."""

    rank_timeout_s: PositiveFloat = 60.0
    """Time after which a trainer rank whose host cannot be reached counts as lost, in seconds: the others end, are
    started again and go on from the newest checkpoint once all are there."""

    @property
    def trainer_world_size(self) -> int:
        """Trainer processes in all; the configuration must be resolved for a device."""
        if self.actor_num_gpus_per_node is None:
            raise ValueError("actor_num_gpus_per_node depends on the device; call JobConfig.resolve(device) first")
        return self.actor_num_nodes * self.actor_num_gpus_per_node
