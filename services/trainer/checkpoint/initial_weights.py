"""Where a policy's weights come from before its first step: a Hugging Face folder, or a torch_dist checkpoint."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from miles.checkpoint_folder import same_folder
from miles.megatron_checkpoint import is_foreign, tensors_of

if TYPE_CHECKING:
    from miles.config import JobConfig


def initial_weights(config: JobConfig) -> str:
    """Return the folder of the policy's first weights: the checkpoint of `load` or `ref_load`, else hf_checkpoint.

    A Megatron-LM checkpoint in `load` comes first; `ref_load` counts if it is a torch_dist checkpoint, as in scripts of
    systems that convert a model to one before they train it.
    """
    checkpoint = config.checkpoint
    if config.train.train_backend == "megatron":
        for key in ("load", "ref_load"):
            folder = getattr(checkpoint, key)
            if folder is not None and (key == "ref_load" or is_foreign(pathlib.Path(folder))):
                found = tensors_of(pathlib.Path(folder), checkpoint.ref_ckpt_step if key == "ref_load" else None)
                if found is not None:
                    return str(found)
    return str(config.rollout.hf_checkpoint)


def gives_weights_alone(config: JobConfig) -> bool:
    """Whether `load` names weights to start from, and no checkpoint to resume."""
    load = config.checkpoint.load
    if load is None:
        return False
    megatron = config.train.train_backend == "megatron" and is_foreign(pathlib.Path(load))
    return megatron or same_folder(pathlib.Path(load), pathlib.Path(str(config.rollout.hf_checkpoint)))


def where_from(config: JobConfig) -> str:
    """Say what a fresh start takes from other folders than hf_checkpoint; empty when nothing."""
    found, load = initial_weights(config), config.checkpoint.load
    if found == str(config.rollout.hf_checkpoint):
        return f"load = {load} is hf_checkpoint: starting from its weights" if gives_weights_alone(config) else ""
    return f"starting from the weights of {found}: optimizer, random states and step count begin afresh"
