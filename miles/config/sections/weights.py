"""Weight updates: how new weights reach the engines."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Ignored, Metavar, Positive, PositiveFloat, Section


class WeightsConfig(Section):
    """Weight updates of the engines."""

    update_weight_transfer_mode: Literal[
        "auto", "shared_memory", "disk_delta", "grpc_chunks", "broadcast", "cuda_ipc", "p2p", "disk-delta"
    ] = "auto"
    """Transport of weights: shared_memory maps a file of this host without a copy; disk_delta writes changes to
    update_weight_disk_dir; grpc_chunks streams chunks, or changes of them, through the weight-sync service; broadcast
    sends from the trainer's ranks to the engines, by NCCL between GPUs and gloo between CPUs; cuda_ipc shares GPU
    memory within a node. auto is cuda_ipc if trainer and all engines have proven that they can share GPU memory and the
    model is small beside it; otherwise each engine gets the first of shared_memory, disk_delta and grpc_chunks that it
    can use. p2p stands for auto, and disk-delta for disk_delta."""

    update_weight_disk_dir: Annotated[str | None, Metavar("DIR")] = None
    """Folder on storage shared by weight-sync service, trainers and engines, for engines on other hosts
    (disk_delta)."""

    update_weight_delta_encoding: Literal["xor", "overwrite"] = "xor"
    """disk_delta: encode changes as new XOR old bytes, or as positions and values of changed elements."""

    update_weight_full_interval: Positive = 10
    """disk_delta: number of versions between full ones, which engines without an earlier version load."""

    weight_lease_s: PositiveFloat = 300.0
    """Time that an engine may keep serving without contact to the weight-sync service, in seconds; then it is
    quarantined until it has loaded the current version."""

    update_weight_buffer_size: Positive = 512 << 20
    """Size of the buckets in which weights are all-gathered and sent, in bytes; each trainer rank needs memory for two
    buckets."""

    update_weights_interval: Positive = 1
    """Number of training steps between weight updates; evaluation always gets its exact version."""

    pause_generation_mode: Literal["retract", "in_place", "abort"] = "retract"
    """What a weight update does to running requests: retract recomputes their KV cache, in_place keeps it, and abort
    preempts them, to be resumed by any rollout."""

    check_weight_update_equal: bool = False
    """After each update, compare the weights of every engine with those that the trainer sent."""

    check_weight_update_allow_quant_error: Annotated[
        bool | None,
        Ignored("engines get the trainer's own quantised numbers, and what they hold is compared bit for bit"),
    ] = None
    """Accepted as scripts have it."""
