"""The FSDP backend with a recipe: what it computes with, what it trains, and what it exports."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_cases import hf_log_probs, job_config, random_groups, write_dense_model, write_moe_model

from miles.checkpoint_folder import folder_name
from miles.precision.emulation.linear import RoundedLinear
from miles.precision.of_run import rollout_recipe
from miles.precision.tensors import QuantisedTensors, restored
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.backends.fsdp.model.sharded_model import named_weights
from miles.types import SampleGroup
from miles.weights.export_format import formatted

pytestmark = pytest.mark.usefixtures("process_group")

# A step of Adam with a large epsilon is proportional to the gradient, so that weights after it show the gradient.
GRADIENT_STEP: dict[str, Any] = {"adam_eps": 1.0, "lr": 1.0, "clip_grad": 0.0}
FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}
INT4 = {"int4_qat": True, "int4_group_size": 8, "int4_layers": ["."]}
FORMATS: dict[str, dict[str, Any]] = {
    "fp8_block": FP8,
    "int4": INT4,
    "mxfp8": {"fp8_format": "e4m3", "fp8_recipe": "mxfp8"},
    "nvfp4": {"fp4_format": "e2m1", "fp4_recipe": "nvfp4"},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_moe_model(tmp_path_factory.mktemp("moe") / "model")


def loaded(model: pathlib.Path, **changes: Any) -> FsdpBackend:
    backend = FsdpBackend(job_config(model, **changes), model / "checkpoints", torch.device("cpu"))
    backend.load()
    return backend


def train(backend: FsdpBackend, groups: list[SampleGroup], step: int = 0) -> dict[str, float]:
    return dict(backend.train(step, groups, lambda progress: None))


def weights(backend: FsdpBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backend.export()}


def after_one_step(model: pathlib.Path, groups: list[SampleGroup], **changes: Any) -> dict[str, torch.Tensor]:
    backend = loaded(model, **GRADIENT_STEP, **changes)
    train(backend, groups)
    return weights(backend)


def assert_same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance, msg=name)


def as_engines_get_them(backend: FsdpBackend, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The exported weights, quantised and dequantised."""
    recipe = rollout_recipe(backend._config)
    assert recipe is not None
    exported = {name: tensor.to(dtype) for name, tensor in backend.export()}
    sent = dict(formatted(QuantisedTensors(recipe), exported.items()))
    assert sent.keys() != exported.keys()
    return restored(recipe, {name: tuple(t.shape) for name, t in exported.items()}, sent, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["dense", "moe"])
def test_the_policy_computes_with_what_its_export_stands_for(
    family: str, name: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    changes = FORMATS[name] | {"train_dtype": dtype, "rollout_dtype": dtype}
    backend = loaded(request.getfixturevalue(family), **changes)
    expected = as_engines_get_them(backend, getattr(torch, dtype))
    policy = backend._loaded.roles.policy
    masters = dict(named_weights(policy.model))
    assert {weight.dtype for weight in masters.values()} == {torch.float32}
    with policy.weights.in_use():
        used = {weight_name: weight.detach().clone() for weight_name, weight in named_weights(policy.model)}
    assert used.keys() == expected.keys()
    for weight_name, weight in used.items():
        assert weight.view(torch.uint8).equal(expected[weight_name].view(torch.uint8)), weight_name
    assert all(weight is masters[weight_name] for weight_name, weight in named_weights(policy.model))


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_int4_computes_and_trains_as_a_stock_model_of_the_rounded_weights(
    family: str, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    """Its inputs are not rounded, so that a model that is trained from these weights has the same gradient."""
    model, groups = request.getfixturevalue(family), random_groups(1)
    before = weights(loaded(model))
    write = write_dense_model if family == "dense" else write_moe_model
    rounded = write(tmp_path / "model")
    published = loaded(model, **INT4)._loaded.published.model
    stored = dict(published.conversion.to_checkpoint(as_engines_get_them(loaded(model, **INT4), torch.float32).items()))
    assert stored.keys() == load_file(rounded / "model.safetensors").keys()
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, rounded / "model.safetensors")
    samples = [sample for group in groups for sample in group.samples]
    for sample, log_probs in zip(samples, hf_log_probs(rounded, groups, 1.0), strict=True):
        sample.rollout_log_probs = log_probs
    backend = loaded(model, **GRADIENT_STEP, **INT4)
    metrics = train(backend, groups)
    assert metrics["train/train_rollout_logprob_abs_diff"] < 2e-6
    after, start = after_one_step(rounded, groups), weights(loaded(rounded))
    steps = {name: (weight - before[name], after[name] - start[name]) for name, weight in weights(backend).items()}
    assert_same(*({name: pair[side] for name, pair in steps.items()} for side in (0, 1)))


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_checkpointed_layers_are_rounded_alike_when_they_are_computed_again(
    family: str, request: pytest.FixtureRequest
) -> None:
    model, groups = request.getfixturevalue(family), random_groups(2)
    kept = after_one_step(model, groups, **FP8)
    assert_same(kept, after_one_step(model, groups, **FP8, gradient_checkpointing=True), 0)
    plain = after_one_step(model, groups)
    assert any(not torch.allclose(kept[name], plain[name], atol=1e-3) for name in kept)


def test_the_reference_computes_as_the_policy_does_and_a_critic_in_full_precision(dense: pathlib.Path) -> None:
    kl = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3", "ref_update_interval": 2}
    backend = loaded(dense, advantage_estimator="ppo", **kl, **FP8)
    kls = [train(backend, random_groups(step), step)["train/kl_loss"] for step in range(3)]
    assert kls[0] == kls[2] == 0 < kls[1]
    roles = backend._loaded.roles
    assert roles.critic is not None
    counts = [sum(isinstance(m, RoundedLinear) for m in model.modules()) for model in roles.models]
    assert counts == [3 * 7, 0, 3 * 7]


def test_a_resumed_run_goes_on_from_its_masters_bit_for_bit(moe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = job_config(moe, **FP8)
    first = FsdpBackend(config, tmp_path, torch.device("cpu"))
    state = first.load()
    state.finish_step(train(first, random_groups(0), 0))
    first.save(tmp_path / folder_name(1), state)
    second = FsdpBackend(config, tmp_path, torch.device("cpu"))
    assert second.load() == state
    assert_same(weights(first), weights(second), 0)
    for backend in (first, second):
        backend.release_memory()
        backend.restore_memory()
        train(backend, random_groups(1), 1)
    assert_same(weights(first), weights(second), 0)
