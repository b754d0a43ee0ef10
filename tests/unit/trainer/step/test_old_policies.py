"""Old policies: which versions are kept, their log-probabilities, and what a checkpoint restores."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from trainer_cases import hf_log_probs, job_config, random_groups, train_recorded, write_dense_model

from miles.checkpoint_folder import folder_name
from miles.services.trainer.backends.fsdp import checkpoint
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.batch.rollout_batch import build_batch, in_order
from miles.services.trainer.step.old_policies import OldPolicies
from miles.types import Sample, SampleGroup, VersionSpan

KEEP: dict[str, Any] = {"keep_old_actor": True, "max_weight_staleness": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("dense"))


def loaded(model: pathlib.Path, checkpoints: pathlib.Path, **changes: Any) -> FsdpBackend:
    backend = FsdpBackend(job_config(model, **KEEP, **changes), checkpoints, torch.device("cpu"))
    backend.load()
    return backend


def publish(backend: FsdpBackend) -> None:
    for _ in backend.export():
        pass


def samples_of(groups: list[SampleGroup]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def generated_by(seed: int, versions: list[int]) -> list[SampleGroup]:
    """Groups whose responses are cut into as many spans as there are versions, as far as they are long enough."""
    groups = random_groups(seed)
    for sample in samples_of(groups):
        ends = [sample.response_length * (i + 1) // len(versions) for i in range(len(versions))]
        starts = [0, *ends[:-1]]
        spans = [VersionSpan(v, s, e) for v, s, e in zip(versions, starts, ends, strict=True) if s < e]
        sample.weight_versions = tuple(spans)
    return groups


def test_versions_are_kept_while_samples_of_them_may_come() -> None:
    weight = torch.zeros(1)
    old = OldPolicies(lambda: [("w", weight)], lambda batch, report: weight.clone(), staleness=2)
    seen = []
    for version in range(5):
        weight.fill_(version)
        old.publish()
        old.keep(version)
        seen.append({v: float(copy.tensors["w"]) for v, copy in old.copies.items()})
    assert seen == [{0: 0.0}, {0: 0.0, 1: 1.0}, {1: 1.0, 2: 2.0}, {2: 2.0, 3: 3.0}, {3: 3.0, 4: 4.0}]


def test_only_published_versions_are_kept() -> None:
    weight = torch.zeros(1)
    old = OldPolicies(lambda: [("w", weight)], lambda batch, report: weight.clone(), staleness=3)
    seen = []
    for version in range(6):
        if version % 2 == 0:
            old.publish()
        old.keep(version)
        seen.append(sorted(old.copies))
    assert seen == [[0], [0], [0, 2], [2], [2, 4], [4]]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("steps", [1, 2])
def test_a_token_has_the_log_probability_of_the_version_that_generated_it(
    dense: pathlib.Path, tmp_path: pathlib.Path, steps: int
) -> None:
    backend = loaded(dense, tmp_path, num_steps_per_rollout=steps)
    folders = []
    for version in range(3):
        backend.save_hf(tmp_path / f"hf-{version}")
        folders.append(tmp_path / f"hf-{version}")
        publish(backend)
        if version < 2:
            train_recorded(backend._loaded.trainer, generated_by(version, [0]), version)
    groups = generated_by(7, [0, 1, 2])
    metrics, known = train_recorded(backend._loaded.trainer, groups, 2)
    by_version = [hf_log_probs(folder, groups, 1.0) for folder in folders]
    old = total = 0
    for i, sample in enumerate(samples_of(groups)):
        expected = np.concatenate([by_version[s.version][i][s.start : s.end] for s in sample.weight_versions])
        np.testing.assert_allclose(known[sample.group_id, sample.index].train_log_probs, expected, atol=2e-5)
        old += sum(s.end - s.start for s in sample.weight_versions if s.version < 2)
        total += sample.response_length
    assert metrics["train/old_actor_ratio"] == pytest.approx(old / total)
    assert abs(by_version[0][0] - by_version[2][0]).max() > 0.01
    assert metrics["train/ppo_kl"] != 0  # the ratio is to the version that generated
    assert sorted(backend._loaded.roles.old_policies.copies) == [1, 2]  # type: ignore[union-attr]


@pytest.mark.usefixtures("process_group")
def test_querying_an_old_policy_leaves_the_policy_unchanged(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    backend = loaded(dense, tmp_path)
    roles = backend._loaded.roles
    assert roles.old_policies is not None
    groups = generated_by(0, [0])
    train_recorded(backend._loaded.trainer, groups)
    batch = build_batch(in_order(groups), job_config(dense, **KEEP), rank=0, ranks=1)
    before = {name: tensor.clone() for name, tensor in backend.export()}
    says, said, says_again = (
        ask(batch, lambda progress: None)
        for ask in (
            roles.policy.compute_log_probs,
            functools.partial(roles.old_policies.compute_log_probs, 0),
            roles.policy.compute_log_probs,
        )
    )
    assert (says - said).abs().max() > 0.01
    assert says.equal(says_again)
    assert all(before[name].equal(tensor) for name, tensor in backend.export())


@pytest.mark.usefixtures("process_group")
def test_without_a_copy_the_engines_log_probabilities_are_used(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    backend = loaded(dense, tmp_path)
    groups = generated_by(3, [4])
    metrics, known = train_recorded(backend._loaded.trainer, groups, 5)
    for sample in samples_of(groups):
        assert sample.rollout_log_probs is not None
        np.testing.assert_array_equal(known[sample.group_id, sample.index].train_log_probs, sample.rollout_log_probs)
    assert metrics["train/old_actor_ratio"] == 0


@pytest.mark.usefixtures("process_group")
def test_a_resumed_run_has_its_old_policies_bit_for_bit(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first = loaded(dense, tmp_path)
    state = first.load()
    for version in range(2):
        publish(first)
        state.finish_step(dict(first.train(version, generated_by(version, [version]), lambda progress: None)))
    first.save(tmp_path / folder_name(2), state)
    second = loaded(dense, tmp_path)
    results = []
    for backend in (first, second):
        publish(backend)
        metrics, known = train_recorded(backend._loaded.trainer, generated_by(9, [0, 1, 2]), 2)
        results.append((metrics, known, dict(backend.export())))
    (metrics, known, weights), (again, known_again, weights_again) = results
    assert all(again[name] == value for name, value in metrics.items() if not name.startswith("perf/"))
    assert 0.3 < metrics["train/old_actor_ratio"] < 0.9
    for key in known:
        np.testing.assert_array_equal(known[key].train_log_probs, known_again[key].train_log_probs)
    assert all(weights[name].equal(weights_again[name]) for name in weights)


@pytest.mark.usefixtures("process_group")
def test_a_copy_is_saved_and_loaded_where_it_lies() -> None:
    mesh = DeviceMesh("meta", [0])  # a device that is not the copy's, as a GPU is
    weight = DTensor.from_local(torch.empty(2, 3, device="meta"), mesh, [Shard(0)])
    part = torch.zeros(2, 3)
    assert checkpoint._like(weight, part).to_local().data_ptr() == part.data_ptr()
