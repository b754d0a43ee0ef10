"""How new weights reach the engines."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Metavar, Positive, PositiveFloat, Section


class WeightsConfig(Section):
    """Publication of weights."""

    update_weight_transfer_mode: Literal[
        "auto", "shared_memory", "disk_delta", "grpc_chunks", "broadcast", "cuda_ipc"
    ] = "auto"
    """Transport: shared_memory maps a file of this host, without a copy; disk_delta writes what changed to
    update_weight_disk_dir; grpc_chunks streams through the weight-sync service. auto gives each engine the first of
    these that it can use. broadcast sends from the trainer's ranks to the engines, by NCCL between GPUs and by gloo
    between CPUs; cuda_ipc shares GPU memory within a node."""

    update_weight_disk_dir: Annotated[str | None, Metavar("DIR")] = None
    """Folder on storage that the weight-sync service, trainers and engines share, for engines on other hosts."""

    update_weight_delta_encoding: Literal["xor", "overwrite"] = "xor"
    """disk_delta: write new bytes XOR old ones, or the positions and values of the elements that changed."""

    update_weight_full_interval: Positive = 10
    """disk_delta: every so many versions one is written whole, for engines that come without an earlier one."""

    weight_lease_s: PositiveFloat = 300.0
    """How long an engine that hears nothing from the weight-sync service may go on serving, in seconds; then it leaves
    routing until it has loaded the current version."""

    update_weight_buffer_size: Positive = 512 << 20
    """Size of the buckets in which weights are gathered and sent, in bytes; each rank of the trainer holds two of them
    beside its own part of the model."""

    rollout_weight_format: Literal["as_trained", "fp8_block"] = "as_trained"
    """What engines get: weights in rollout_dtype, or FP8 values with a scale for each block of 128 × 128 (matrices but
    embeddings, head and routers; torch engine, which computes with what they stand for)."""

    extra_high_precision_layers_hf: tuple[str, ...] = ()
    """Parts of names of further weights that fp8_block leaves in rollout_dtype."""

    update_weights_interval: Positive = 1
    """Training steps from one publication of the weights to the next; evaluation gets its version in any case."""

    pause_generation_mode: Literal["retract", "in_place", "abort"] = "retract"
    """What an update does to responses under way: retract computes their keys and values anew, in_place keeps those of
    the old weights, abort hands them back, to be resumed by any rollout."""

    check_weight_update_equal: bool = False
    """After each update, compare what every engine holds with what the trainer sent."""
