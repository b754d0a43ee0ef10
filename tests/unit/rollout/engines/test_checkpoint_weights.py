"""Weights read from a folder are what a trainer that has not trained yet would publish."""

from __future__ import annotations

import pathlib

import pytest
import torch
from megatron_models import write_model
from safetensors.torch import load_file
from trainer_cases import job_config

from miles.services.rollout.engines.checkpoint_weights import read_published, read_weights
from miles.weights.naming.model_tensors import shared_by_mtp
from miles.weights.naming.published import published_tensors


@pytest.mark.parametrize("drafts", [False, True])
def test_weights_for_sglang_are_those_of_the_files(tmp_path: pathlib.Path, drafts: bool) -> None:
    folder = write_model("GLM-4.5, MTP", tmp_path / "model")
    config = job_config(
        folder,
        train_backend="megatron",
        rollout_backend="sglang",
        mtp_num_layers=1,
        device="cuda",
        sglang_speculative_algorithm="NEXTN" if drafts else None,
    )
    files, found = load_file(folder / "model.safetensors"), read_published(config)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == dict(published_tensors(config).shapes)
    assert all(torch.equal(tensor, files[name]) for name, tensor in found.items())
    left_out = {name for name in files.keys() - found.keys() if shared_by_mtp(name) is None}
    assert bool(left_out) is not drafts
    assert all(name.startswith("model.layers.4.") for name in left_out)


def test_what_routers_add_to_their_scores_stays_in_float32(tmp_path: pathlib.Path) -> None:
    weights = read_weights(str(write_model("DeepSeek-V3", tmp_path / "model")), "bfloat16")
    wide = {name.rpartition(".")[2] for name, tensor in weights.items() if tensor.dtype == torch.float32}
    assert wide == {"e_score_correction_bias"}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16, torch.float32}
