"""The contract between trainer and engines: which tensors a version of a job's policy consists of."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from miles.config.checks.json_file import read_json_object
from miles.engine_spec import WeightForm, engine_spec

if TYPE_CHECKING:
    from miles.config import JobConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightContract:
    """What both training backends publish, and what the job's engines expect."""

    form: WeightForm
    """Whether a layer's experts come in one tensor, or each expert's matrices by themselves."""
    mtp: bool = False
    """Whether the MTP layers are part of it; in the checkpoint form alone."""
    every_name: bool = False
    """Whether a tied tensor comes under each of its names instead of the first; in the checkpoint form alone."""


def contract_of(config: JobConfig) -> WeightContract:
    """The contract of a job. Reads config.json of its model, but needs neither torch nor transformers."""
    rollout = config.rollout
    engine = engine_spec(rollout.rollout_backend)
    flags = rollout.sglang_args
    algorithm = str(flags.get("speculative_algorithm") or "").upper()
    drafts = algorithm in engine.mtp_drafts and flags.get("speculative_draft_model_path") is None
    trained = config.train.train_backend == "megatron" and config.megatron.mtp_num_layers is not None
    model = read_json_object(pathlib.Path(str(rollout.hf_checkpoint)) / "config.json")
    return WeightContract(
        form=engine.weight_form,
        mtp=drafts and trained,
        every_name=rollout.rollout_engine_weights == "distributed" and model.get("model_type") in engine.unties,
    )
