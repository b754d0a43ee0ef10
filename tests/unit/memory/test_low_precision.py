"""What formats take of disks and in trainers and engines, against tensors that are written, held and received."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
import torch
from config_cases import MINIMAL
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from miles.config import JobConfig
from miles.launcher.placement import settings_of
from miles.memory.amount import When
from miles.memory.disk import disk_part
from miles.memory.engines import engine_parts, weights_part
from miles.memory.host import versions_part
from miles.memory.least import trainer_state
from miles.memory.low_precision import KERNEL_WEIGHTS, by_kernels, notes
from miles.memory.report import trainer_parts
from miles.memory.run import Run, run_of
from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors, restored
from miles.services.trainer.backends.fsdp.model.working_weights import WorkingWeights

SIZES = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": False,
}  # fmt: skip
FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}
INT4 = {"int4_qat": True, "int4_layers": (".",), "int4_group_size": 32}
MEGATRON = {"train_backend": "megatron", "rollout_backend": "sglang"}
DEEPSEEK = pathlib.Path(__file__).parents[2] / "support/deepseek_v3.json"


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    return tmp_path


def run(model: pathlib.Path, device: str = "cpu", **changes: Any) -> Run:
    config = JobConfig.from_flat({**MINIMAL, "hf_checkpoint": str(model), **changes}).resolve(device)  # type: ignore[arg-type]
    found = run_of(settings_of(config))
    assert found is not None
    return found


def named(parts: list[Any], name: str) -> int:
    return sum(part.bytes for part in parts if part.name == name)


def weights_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return dict(LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).state_dict())


@pytest.mark.parametrize("flags", [{}, FP8, INT4, {"rollout_weight_format": "fp8_block"}], ids=str)
def test_a_written_folder_is_as_large_as_estimated(model: pathlib.Path, flags: dict[str, Any]) -> None:
    found = run(model, train_dtype="bfloat16", rollout_dtype="bfloat16", **flags)
    tensors = weights_of(torch.bfloat16)
    if found.serving is not None:
        export = QuantisedTensors(found.serving)
        tensors = {part: value for name, each in tensors.items() for part, value in export.convert(name, each)}
    save_file(tensors, model / "model.safetensors")
    assert (model / "model.safetensors").stat().st_size == pytest.approx(found.published.bytes, rel=0.01)
    assert versions_part(found).bytes == 2 * found.published.bytes
    assert disk_part(found).bytes > found.published.bytes


@pytest.mark.parametrize("flags", [FP8, INT4], ids=str)
def test_the_torch_engine_holds_parts_and_what_they_stand_for(model: pathlib.Path, flags: dict[str, Any]) -> None:
    found = run(model, train_dtype="bfloat16", rollout_dtype="bfloat16", **flags)
    assert found.serving is not None
    tensors, export = weights_of(torch.bfloat16), QuantisedTensors(found.serving)
    sent = {part: value for name, each in tensors.items() for part, value in export.convert(name, each)}
    served = restored(found.serving, {name: tuple(each.shape) for name, each in tensors.items()}, sent, torch.bfloat16)
    both = {tensor.data_ptr(): tensor.nbytes for tensor in (*sent.values(), *served.values())}
    assert weights_part(found).bytes == sum(both.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [{}, FP8, INT4], ids=str)
def test_one_rank_of_fsdp_computes_with_copies_of_this_size(
    model: pathlib.Path, dtype: str, flags: dict[str, Any]
) -> None:
    found = run(model, train_dtype=dtype, rollout_dtype=dtype, **flags)
    trained = LlamaForCausalLM(LlamaConfig(**SIZES))
    masters = {id(parameter) for parameter in trained.parameters()}
    with WorkingWeights.of(trained, getattr(torch, dtype), found.training).in_use():
        copies = sum(each.nbytes for each in trained.parameters() if id(each) not in masters)
    assert named(trainer_state(found)[0], "working weights") == copies


def test_shards_and_pipelines_hold_what_they_rounded_until_the_backward_pass(model: pathlib.Path) -> None:
    sharded = {"actor_num_gpus_per_node": 2, **INT4}
    covered = 3 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 704)
    assert named(trainer_state(run(model, **sharded))[0], "rounded weights") == 4 * covered
    layer_by_layer = trainer_state(run(model, **sharded, gradient_checkpointing=True))[0]
    assert named(layer_by_layer, "rounded weights") == 4 * covered // 3
    pipeline = {"train_backend": "megatron", "actor_num_gpus_per_node": 3, "pipeline_model_parallel_size": 3}
    found = run(model, **INT4, **pipeline, train_dtype="float32")
    each = [named(trainer_state(found, stage)[0], "rounded weights") for stage in range(3)]
    assert each == [4 * covered // 3] * 3


def test_transformer_engine_keeps_two_copies_in_fp8_until_the_trainer_is_parked(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(DEEPSEEK.read_text())
    layout = {"actor_num_nodes": 16, "actor_num_gpus_per_node": 8, "expert_model_parallel_size": 64, "host": "10.0.0.1",
              "use_distributed_optimizer": True, "n_samples_per_prompt": 8, "rollout_batch_size": 32}  # fmt: skip
    found = run(tmp_path, "cuda", **MEGATRON, **layout, **FP8, train_dtype="bfloat16", colocate=True)
    assert by_kernels(found)
    assert any("upper bound" in note for note in notes(found))
    device, host = trainer_parts(found)
    kept = next(part for part in device if part.name == KERNEL_WEIGHTS)
    weights = named(device, "policy weights")
    assert kept.when is When.TRAINING
    assert 0.9 * weights < kept.bytes < weights  # all but embedding, head and routers, at two bytes each
    assert named(host, "parked trainer") == weights + named(device, "policy optimizer")
    emulated = run(tmp_path, "cuda", **MEGATRON, **layout, **FP8, train_dtype="bfloat16", low_precision_impl="emulated")
    assert not by_kernels(emulated)
    assert named(trainer_parts(emulated)[0], "rounded weights") == pytest.approx(kept.bytes, rel=0.001)


def test_mxfp8_is_counted_as_kernels_hold_it_which_is_more_than_emulation_does(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(DEEPSEEK.read_text())
    flags = {**MEGATRON, "train_dtype": "bfloat16", "fp8_format": "e4m3", "fp8_recipe": "mxfp8",
             "rollout_weight_format": "as_trained"}  # fmt: skip
    found = run(tmp_path, "cuda", **flags)
    assert by_kernels(found)
    assert any("16 bits instead, which is less" in note for note in notes(found))
    emulated = run(tmp_path, "cuda", **flags, low_precision_impl="emulated")
    kept = named(trainer_state(found)[0], KERNEL_WEIGHTS)
    rounded = named(trainer_state(emulated)[0], "rounded weights")
    assert rounded < kept == pytest.approx(rounded * (1 + 1 / 32), rel=0.001)
    assert not by_kernels(run(tmp_path, "cuda", **flags, transformer_impl="local"))


def test_sglang_holds_its_parts_alone_and_a_cache_in_fp8_has_twice_the_tokens(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(DEEPSEEK.read_text())
    wide = run(tmp_path, "cuda", **MEGATRON, rollout_num_gpus_per_engine=8, rollout_weight_format="as_trained")
    found = run(tmp_path, "cuda", **MEGATRON, rollout_num_gpus_per_engine=8)
    assert found.serving == Recipe(format="fp8_block")  # as the folder is
    assert (
        weights_part(found).bytes == found.published.bytes // 8 == pytest.approx(weights_part(wide).bytes / 2, rel=0.01)
    )
    narrow = dataclasses.replace(found, settings=found.settings.changed(sglang_args={"kv_cache_dtype": "fp8_e4m3"}))
    assert f"tokens of {61 * 576} bytes" in engine_parts(narrow, 140 << 30)[1].formula


def test_drafts_of_mtp_layers_are_in_the_format_of_the_weights(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(DEEPSEEK.read_text())
    found = run(tmp_path, "cuda", **MEGATRON, sglang_speculative_algorithm="NEXTN")
    assert found.published.bytes * 1.015 < weights_part(found).bytes < found.published.bytes * 1.02
