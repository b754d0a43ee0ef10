"""What SGLang cannot serve or update in few bits is refused before the start."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.checks.served_precision import served_precision_faults
from miles.config.job import examine

DENSE: dict[str, Any] = {
    "model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
EXPERTS = DENSE | {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 256}
LATENT = EXPERTS | {
    "model_type": "deepseek_v3", "kv_lora_rank": 128, "q_lora_rank": 256, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def faults(folder: pathlib.Path, model: dict[str, Any], **changes: Any) -> list[str]:
    (folder / "config.json").write_text(json.dumps(model))
    flat = {**MINIMAL, "rollout_backend": "sglang", "hf_checkpoint": str(folder), "device": "cuda", **changes}
    flat.setdefault("rollout_dtype", "bfloat16")
    return [str(fault) for fault in served_precision_faults(examine(flat).settings)]


@pytest.mark.parametrize("model", [DENSE, EXPERTS, LATENT], ids=["dense", "experts", "latent"])
def test_sizes_that_the_kernels_have_are_served(tmp_path: pathlib.Path, model: dict[str, Any]) -> None:
    assert faults(tmp_path, model, rollout_weight_format="fp8_block", rollout_num_gpus_per_engine=2) == []
    if model is not DENSE:
        assert faults(tmp_path, model, rollout_weight_format="int4", rollout_num_gpus_per_engine=2) == []
    assert faults(tmp_path, DENSE | {"head_dim": 48}) == []


@pytest.mark.parametrize(
    ("model", "changes", "problem"),
    [
        (DENSE | {"head_dim": 80}, {}, "self_attn.q_proj is 320 wide, no multiple of the blocks of 128"),
        (DENSE, {"rollout_num_gpus_per_engine": 8}, "mlp.gate_proj is 64 wide on one of 8 GPUs"),
        (EXPERTS, {"rollout_num_gpus_per_engine": 4}, "mlp.experts.0.gate_proj is 64 wide on one of 4 GPUs"),
        (LATENT | {"kv_lora_rank": 96}, {}, "self_attn.kv_b_proj is 96 wide"),
        (LATENT | {"qk_nope_head_dim": 96}, {"rollout_num_gpus_per_engine": 4}, "kv_b_proj is 224 wide on one of 4"),
        (DENSE, {"extra_high_precision_layers_hf": "k_proj"}, "holds self_attn.q_proj and self_attn.k_proj as one"),
    ],
)
def test_blocks_that_a_gpu_would_have_a_part_of_are_refused(
    tmp_path: pathlib.Path, model: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    found = faults(tmp_path, model, rollout_weight_format="fp8_block", **changes)
    assert any(problem in fault for fault in found), found
    assert faults(tmp_path, model, rollout_backend="torch", rollout_weight_format="fp8_block", **changes) == []


def test_experts_that_are_not_split_need_whole_ones_alone(tmp_path: pathlib.Path) -> None:
    apart: dict[str, Any] = {"rollout_num_gpus_per_engine": 4, "sglang_ep_size": 4}
    wide = EXPERTS | {"num_attention_heads": 8, "num_key_value_heads": 4}
    assert faults(tmp_path, wide, rollout_weight_format="fp8_block", **apart) == []


@pytest.mark.parametrize(
    ("model", "changes", "problem"),
    [
        (DENSE, {}, "of routed experts alone, and the model has none"),
        (EXPERTS, {"int4_layers": "."}, "cannot update the INT4 weights of self_attn.q_proj"),
        (LATENT, {"int4_layers": "experts."}, "cannot update the INT4 weights of mlp.shared_experts.gate_proj"),
        (EXPERTS, {"int4_group_size": 16}, "take groups of 32, 64, 128, not of 16"),
        (EXPERTS | {"hidden_size": 192}, {"int4_group_size": 32}, "need a hidden size in multiples of 128"),
        (EXPERTS | {"moe_intermediate_size": 96}, {"int4_group_size": 32}, "experts are 96 wide on one of 1 GPUs"),
        (EXPERTS, {"sglang_moe_runner_backend": "triton"}, "cannot update INT4 weights that this runner has repacked"),
    ],
)
def test_int4_that_servers_cannot_update_is_refused(
    tmp_path: pathlib.Path, model: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    found = faults(tmp_path, model, rollout_weight_format="int4", **changes)
    assert any(problem in fault for fault in found), found


def test_devices_types_flags_and_drafts_that_do_not_fit_are_refused(tmp_path: pathlib.Path) -> None:
    def found(**changes: Any) -> str:
        (fault,) = faults(tmp_path, DENSE, rollout_weight_format="fp8_block", **changes)
        return fault

    assert "SGLang serves fp8_block on GPUs alone, and device = cpu" in found(device="cpu")
    assert "inputs of 16 bits" in found(rollout_dtype="float32")
    assert "sglang_quantization" in found(sglang_quantization="fp8")
    assert "own MTP layers are not served beside fp8_block" in found(sglang_speculative_algorithm="NEXTN")
    override = '{"quantization_config": {}}'
    assert "sglang_json_model_override_args" in found(sglang_json_model_override_args=override)
    other = '{"rope_theta": 1}'
    assert faults(tmp_path, DENSE, rollout_weight_format="fp8_block", sglang_json_model_override_args=other) == []


def test_the_format_of_the_folder_counts_unless_weights_are_served_as_trained(tmp_path: pathlib.Path) -> None:
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = DENSE | {"head_dim": 80, "quantization_config": stated}
    assert "rollout_weight_format = auto, but self_attn.q_proj is 320 wide" in faults(tmp_path, model)[0]
    assert faults(tmp_path, model, rollout_weight_format="as_trained", rollout_dtype="float32") == []


def test_flags_of_a_group_of_servers_are_looked_at_too(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "servers.yaml"

    def found(name: str, overrides: str, **changes: Any) -> list[str]:
        second = f"{{num_gpus: 1, overrides: {{{overrides}}}}}"
        file.write_text(f"sglang: [{{name: actor, server_groups: [{{num_gpus: 1}}, {second}]}}]")
        return faults(tmp_path, EXPERTS, rollout_weight_format=name, sglang_config=str(file), **changes)

    (fault,) = found("int4", "moe-runner-backend: triton")
    assert fault.startswith(
        f"sglang_config = {file}, but moe_runner_backend of server_groups[1] is triton, and SGLang cannot update INT4"
    )
    assert found("int4", "moe_runner_backend: marlin") == []
    assert found("fp8_block", "moe_runner_backend: triton") == []
    for flag in ("load_format: auto", "json_model_override_args: {quantization_config: {}}"):
        (fault,) = found("fp8_block", flag)
        assert f"{flag.partition(':')[0]} of server_groups[1] is" in fault
    (fault,) = found("int4", "page_size: 1", sglang_moe_runner_backend="triton")
    assert fault.startswith("sglang_moe_runner_backend = triton")
