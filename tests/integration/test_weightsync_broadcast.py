"""Weights by broadcast through the real services: trainer ranks, weightsync, engines."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import pytest
import torch
from trainer_cases import job_config, write_dense_model, write_moe_model
from trainer_process import TrainerProcess
from weightsync_processes import Engine, Lines, Service, digest


@pytest.fixture
def weightsync(tmp_path: pathlib.Path) -> Iterator[Service]:
    (tmp_path / "shared").mkdir()
    service = Service(None, tmp_path / "shared")
    yield service
    service.kill()


@pytest.fixture
def keep() -> Iterator[Callable[[Lines], Lines]]:
    """Has processes killed at the end of the test."""
    started: list[Lines] = []

    def one(process: Lines) -> Lines:
        started.append(process)
        return process

    yield one
    for process in reversed(started):
        process.kill()


def stored_weights(model: pathlib.Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a trainer that has not trained yet exports."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return {name: p.detach().to(dtype) for name, p in loaded.named_parameters(remove_duplicate=True)}


@pytest.mark.parametrize(("family", "ranks"), [("tied", 1), pytest.param("moe", 2, marks=pytest.mark.engine)])
def test_two_engines_and_a_later_one_serve_the_bytes_of_the_trainers_ranks(
    family: str,
    ranks: int,
    tmp_path: pathlib.Path,
    redis_url: str,
    job_id: str,
    weightsync: Service,
    keep: Callable[..., Lines],
) -> None:
    model = write_moe_model(tmp_path / "model") if family == "moe" else write_dense_model(tmp_path / "model", tied=True)
    config = job_config(
        model,
        rollout_dtype="bfloat16",
        actor_num_gpus_per_node=ranks,
        update_weight_transfer_mode="broadcast",
        update_weight_buffer_size=8192,
    )
    trainer = TrainerProcess(ranks)
    keep(trainer)
    engines = [Engine(weightsync, f"engine-{i}", job=job_id) for i in range(2)]
    for engine in engines:
        keep(engine)
    trainer.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    trainer.export(job_id, 0)
    weightsync.wait_until(lambda state: len(state.engines) == 2, "two engines")
    done = weightsync.activate(0, 2, job=job_id, check_equal=True)
    assert (done.engines, done.quarantined) == (2, 0)
    expected = digest(stored_weights(model, torch.bfloat16))
    for engine in engines:
        assert engine.digest() == expected

    engines[0].kill()
    late = Engine(weightsync, "engine-2", job=job_id)
    keep(late)
    late.wait_for_state("serving", 0)
    assert late.digest() == expected
    trainer.export(job_id, 0)
    done = weightsync.activate(0, 2, job=job_id, check_equal=True)
    assert (done.engines, done.quarantined) == (2, 0)
    assert late.digest() == engines[1].digest() == expected


@pytest.mark.engine
def test_a_trainer_that_is_gone_leaves_engines_serving_and_newcomers_out(
    tmp_path: pathlib.Path, redis_url: str, job_id: str, weightsync: Service, keep: Callable[..., Lines]
) -> None:
    model = write_dense_model(tmp_path / "model")
    config = job_config(model, update_weight_transfer_mode="broadcast")
    trainer = TrainerProcess()
    keep(trainer)
    engine = Engine(weightsync, "engine-0", job=job_id)
    keep(engine)
    trainer.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    trainer.export(job_id, 0)
    weightsync.wait_until(lambda state: len(state.engines) == 1, "an engine")
    weightsync.activate(0, 1, job=job_id)
    trainer.kill()
    late = Engine(weightsync, "engine-1", job=job_id)
    keep(late)
    late.wait_for_state("quarantined", None)
    assert engine.digest() == digest(stored_weights(model, torch.float32))

    again = TrainerProcess()
    keep(again)
    again.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    again.export(job_id, 0)
    assert weightsync.activate(0, 2, deadline_s=60, job=job_id, check_equal=True).engines == 2
    assert late.digest() == engine.digest()
