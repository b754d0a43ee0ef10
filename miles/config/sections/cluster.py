"""How many processes a run has and how its trainer's ranks find each other."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Derived, Positive, Section, derived


class ClusterConfig(Section):
    """Processes and devices."""

    actor_num_nodes: Positive = 1
    """Nodes the trainer runs on."""

    actor_num_gpus_per_node: Annotated[Positive | None, Derived("8 on CUDA, 1 on CPU")] = None
    """Trainer processes per node; each holds one GPU, or none when the device is the CPU."""

    rollout_num_workers: Positive = 1
    """Rollout services, one inference engine each."""

    colocate: bool = False
    """Trainer and engines share GPUs: they take turns."""

    offload_rollout: Annotated[bool, Derived("on with colocate")] = derived()
    """Free the engines' memory (weights, key-value cache) while the trainer works."""

    distributed_backend: Annotated[Literal["nccl", "gloo"] | None, Derived("nccl on CUDA, gloo on CPU")] = None
    """Backend of the trainer's process group."""

    distributed_timeout_minutes: Positive = 10
    """How long a collective of the trainer may take, in minutes."""

    @property
    def trainer_world_size(self) -> int:
        """Trainer processes in all; the configuration must be resolved for a device."""
        if self.actor_num_gpus_per_node is None:
            raise ValueError("actor_num_gpus_per_node depends on the device; call JobConfig.resolve(device) first")
        return self.actor_num_nodes * self.actor_num_gpus_per_node
