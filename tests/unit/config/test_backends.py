from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.config.backends import MEGATRON_PACKAGES, choose_backends, is_installed
from miles.config.job import examine, resolution, resolved
from miles.config.schema.flat_settings import FlatSettings

EVERYTHING = (*MEGATRON_PACKAGES, "sglang")


def with_packages(*packages: str) -> Callable[[str], bool]:
    return lambda name: name in packages


def unnamed(**changes: Any) -> FlatSettings:
    """Settings before a backend is chosen."""
    settings = examine(MINIMAL | changes).settings
    for key in ("train_backend", "rollout_backend"):
        settings.fill(key, changes.get(key, "auto"))
    return settings


def chosen(device: Literal["cpu", "cuda"], *packages: str, **changes: Any) -> dict[str, str]:
    choices = choose_backends(unnamed(**changes), device, with_packages(*packages))
    return {choice.key: choice.value for choice in choices}


def test_a_gpu_with_the_packages_gets_megatron_and_sglang() -> None:
    assert chosen("cuda", *EVERYTHING) == {"train_backend": "megatron", "rollout_backend": "sglang"}
    assert chosen("cuda", *MEGATRON_PACKAGES) == {"train_backend": "megatron", "rollout_backend": "torch"}
    assert chosen("cuda", "megatron.core", "sglang") == {"train_backend": "fsdp", "rollout_backend": "sglang"}
    assert chosen("cpu", *EVERYTHING) == {"train_backend": "fsdp", "rollout_backend": "torch"}


def test_a_named_backend_is_no_choice() -> None:
    assert chosen("cuda", *EVERYTHING, train_backend="fsdp") == {"rollout_backend": "sglang"}
    assert chosen("cuda", *EVERYTHING, train_backend="fsdp", rollout_backend="torch") == {}


@pytest.mark.parametrize(
    ("said", "trainer"),
    [
        ({"tensor_model_parallel_size": 2}, "megatron"),
        ({"apply_rope_fusion": False}, "megatron"),
        ({"num_layers": 4}, "megatron"),
        ({"swiglu": True}, "megatron"),
        ({"swiglu": False}, "fsdp"),
        ({"num_experts": 4}, "megatron"),
        ({"kv_lora_rank": 4}, "megatron"),
        ({"hidden_dropout": 0.0}, "megatron"),
        ({"gradient_checkpointing": True}, "fsdp"),
        ({"gradient_checkpointing": True, "num_layers": 4}, "fsdp"),
        ({"gradient_checkpointing": True, "tensor_model_parallel_size": 2}, "megatron"),
        ({"attn_implementation": "varlen"}, "fsdp"),
        ({"low_precision_impl": "transformer_engine", "fp8_format": "e4m3", "fp8_recipe": "blockwise"}, "megatron"),
    ],
)
def test_settings_ask_for_a_trainer_before_the_machine_does(said: dict[str, Any], trainer: str) -> None:
    assert chosen("cpu", **said)["train_backend"] == trainer
    if trainer == "fsdp" and "swiglu" not in said:
        assert chosen("cuda", *EVERYTHING, **said)["train_backend"] == "fsdp"


@pytest.mark.parametrize(
    ("said", "engine"),
    [
        ({"sglang_mem_fraction_static": 0.5}, "sglang"),
        ({"rollout_engine_python": "/sglang/bin/python"}, "sglang"),
        ({"colocate": True}, "sglang"),
        ({"colocate": True, "offload_rollout": False, "offload_train": False}, "torch"),
        ({"rollout_num_gpus_per_engine": 1}, "torch"),
        ({"rollout_weight_format": "fp8_block"}, "torch"),
        ({"rollout_weight_format": "mxfp8"}, "torch"),
    ],
)
def test_settings_ask_for_an_engine_before_the_machine_does(said: dict[str, Any], engine: str) -> None:
    assert chosen("cpu", **said)["rollout_backend"] == engine


def test_a_model_that_a_package_does_not_know_gets_the_other_backend(tmp_path: pathlib.Path) -> None:
    model = {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(model))
    settings = unnamed(hf_checkpoint=str(tmp_path))
    trainer, engine = choose_backends(settings, "cuda", with_packages(*EVERYTHING))
    assert str(trainer).startswith("train_backend = fsdp: megatron-bridge ")
    assert engine.value == "sglang"


def test_packages_are_found_without_being_imported() -> None:
    assert is_installed("json")
    assert is_installed("email.mime")
    assert not is_installed("no_such_package.core")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_resolved_configuration_names_its_backends(device: Literal["cpu", "cuda"]) -> None:
    given: dict[str, Any] = {**MINIMAL, "train_backend": "auto", "rollout_backend": "auto", "rollout_batch_size": 16}
    found = resolution(given, device)
    config = JobConfig.from_flat(found.flat)
    assert config.train.train_backend == found.flat["train_backend"] != "auto"
    assert config.rollout.rollout_backend == found.flat["rollout_backend"] != "auto"
    assert [line.partition(" = ")[0] for line in found.chosen] == ["train_backend", "rollout_backend"]
    assert resolved(config.to_flat(), device) == config.to_flat()
    if device == "cpu":
        text = json.dumps(given | {"device": "cpu"})
        assert JobConfig.from_json_here(text) == config


def test_without_a_machine_backends_are_those_that_every_machine_has() -> None:
    config = JobConfig.from_flat({**MINIMAL, "train_backend": "auto", "rollout_backend": "auto"})
    assert (config.train.train_backend, config.rollout.rollout_backend) == ("fsdp", "torch")


def test_a_wrong_value_of_another_setting_hides_no_choice() -> None:
    assert resolved({**MINIMAL, "lr": "x", "colocate": "x"}, "cpu")["train_backend"] == "fsdp"
