"""Loads a job into the draft trainer: its draft model, on a device, from where it stands."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from miles.config.checks.device import detect_device, visible_gpus
from miles.config.speculation import speculation_of
from miles.drafts.initial import ensure_initial

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.rpc.gen import draft_trainer_pb2
    from miles.services.trainer.drafts.job import DraftJob


def device_named(name: str) -> str:
    """Return the device that a name stands for: `auto` is the last GPU, or the CPU of a machine without one."""
    if name == "auto":
        return f"cuda:{visible_gpus() - 1}" if detect_device() == "cuda" else "cpu"
    return name


def load_job(
    request: draft_trainer_pb2.DraftTrainerStartJobRequest,
    config: JobConfig,
    on_change: Callable[[], None],
    device_name: str,
) -> DraftJob:
    """Load a job. Raises FileNotFoundError and ValueError for a draft model, or a checkpoint, that cannot be used."""
    import torch

    from miles.algorithms.any_shape_attention import leave_out_cudnn
    from miles.services.trainer.drafts.job import DraftJob
    from miles.services.trainer.drafts.learner import create_learner

    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        leave_out_cudnn()
    run_dir = pathlib.Path(request.run_dir)
    ensure_initial(config)
    path = speculation_of(config.rollout.sglang_args).draft_model_path
    if path is None or not pathlib.Path(path).is_dir():
        raise FileNotFoundError(
            f"sglang_speculative_draft_model_path = {path} is no folder on the draft trainer's host"
        )
    learner = create_learner(config, pathlib.Path(path), device)
    address, step = request.weightsync_address, request.policy_step if request.HasField("policy_step") else None
    return DraftJob(request.job_id, config, run_dir, address, learner, device, step, on_change)
