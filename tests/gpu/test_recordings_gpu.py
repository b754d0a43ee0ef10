"""Recordings of the FSDP backend on a GPU: copies that are queued, 16-bit types, compiled layers."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from recorded_reference import FLAGS, TEMPERATURE, assert_as_the_stock_model, recorded_in, samples_of
from trainer_cases import job_config, random_groups, write_dense_model

from miles.drafts.recording import RecordedSample
from miles.drafts.recordings import read, steps
from miles.services.trainer.backends.fsdp.backend import FsdpBackend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CUDA = torch.device("cuda", 0)
LAYERS = (-1, 1, 2, 3)
"""Of a model of seven layers."""


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=CUDA)
    yield
    dist.destroy_process_group()


def trained(model: pathlib.Path, count: int = 1, **changes: Any) -> dict[str, torch.Tensor]:
    """Take steps; returns the weights."""
    config = job_config(model, **{"device": "cuda", "distributed_backend": "nccl", **TEMPERATURE, **changes})
    backend = FsdpBackend(config, model / "checkpoints", CUDA)
    backend.load()
    for step in range(count):
        metrics = backend.train(step, random_groups(step), lambda progress: None)
        assert ("draft/recorded_tokens" in metrics) is ("enable_draft_training" in changes)
    return {name: tensor.float().cpu().clone() for name, tensor in backend.export()}


def recorded(model: pathlib.Path, root: pathlib.Path, **changes: Any) -> list[RecordedSample]:
    """What the first step leaves."""
    trained(model, **FLAGS, **recorded_in(root), **changes)
    assert steps(root) == [0]
    return read(root, 0)


def test_in_float32_they_are_what_the_stock_model_computes(tmp_path: pathlib.Path) -> None:
    model = write_dense_model(tmp_path / "model", layers=7)
    found = recorded(model, tmp_path / "recordings")
    assert_as_the_stock_model(model, found, samples_of(random_groups(0)), LAYERS)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"torch_compile": True}])
def test_in_bfloat16_they_are_near(tmp_path: pathlib.Path, changes: dict[str, Any]) -> None:
    model = write_dense_model(tmp_path / "model", layers=7)
    exact = recorded(model, tmp_path / "exact")
    near = recorded(model, tmp_path / "near", train_dtype="bfloat16", **changes)
    for one, other in zip(exact, near, strict=True):
        assert torch.equal(one.tokens_T, other.tokens_T)
        for layer in LAYERS:
            assert other.hidden_TD[layer].dtype == torch.bfloat16
            difference = (one.hidden_TD[layer] - other.hidden_TD[layer].float()).abs().mean()
            assert difference < 0.05 * one.hidden_TD[layer].abs().mean()
        assert (one.top_log_probs_RK - other.top_log_probs_RK).abs().mean() < 0.05


def test_recording_changes_no_bit_of_what_is_trained(tmp_path: pathlib.Path) -> None:
    model = write_dense_model(tmp_path / "model", layers=7)
    both = {"train_dtype": "bfloat16", "deterministic_mode": True}
    plain = trained(model, 3, **both)
    with_it = trained(model, 3, **FLAGS, **recorded_in(tmp_path / "recordings"), **both)
    assert all(torch.equal(plain[name], with_it[name]) for name in plain)
    assert steps(tmp_path / "recordings") == [1, 2]
