"""One recipe is behind folder, trainer and engines: what says otherwise is refused before anything is started."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.backends import is_installed
from miles.config.checks.environment import environment_faults
from miles.config.checks.model import model_faults
from miles.config.checks.precision import precision_faults
from miles.config.job import examine
from miles.config.notes.registry import notes
from miles.config.schema.flat_settings import InvalidSetting
from miles.doctor import low_precision
from miles.doctor.subject import Subject
from miles.memory.run import run_of

MOE = {
    "model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512,
    "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
}  # fmt: skip
DENSE = {**{key: value for key, value in MOE.items() if "expert" not in key}, "model_type": "qwen3"}
FP8_FOLDER = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    "modules_to_not_convert": ["model.layers.0.self_attn"],
}  # fmt: skip
INT4_FOLDER = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
    "ignore": ["re:.*self_attn.*", "lm_head"],
}  # fmt: skip
FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}
MEGATRON = {"train_backend": "megatron", "device": "cpu"}


def faults(folder: pathlib.Path, model: dict[str, Any], quantised: dict[str, Any] | None, **changes: Any) -> list[str]:
    stated = {} if quantised is None else {"quantization_config": quantised}
    (folder / "config.json").write_text(json.dumps(model | stated))
    found = examine({**MINIMAL, "hf_checkpoint": str(folder), **changes})
    assert found.faults == []
    return [str(fault) for fault in precision_faults(found.settings)]


REFUSED: list[tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any], str]] = [
    (
        MOE, FP8_FOLDER, {"int4_qat": True},
        "int4_qat = true, but the weights of hf_checkpoint are rounded to fp8_block already, and int4 is another one; "
        "`miles convert hf-to-hf` it",
    ),
    (
        MOE, INT4_FOLDER, {"rollout_weight_format": "fp8_block"},
        "rollout_weight_format = fp8_block, but the weights of hf_checkpoint are rounded to int4 already; leave it out",
    ),
    (
        MOE, INT4_FOLDER, {"int4_qat": True, "int4_group_size": 128},
        "int4_group_size = 128, but the INT4 weights of hf_checkpoint have groups of 32; leave it out",
    ),
    (
        MOE, FP8_FOLDER, {"fp8_block_scales": "power_of_two"},
        "fp8_block_scales = power_of_two, but the FP8 weights of hf_checkpoint have float32 scales; leave it out",
    ),
    (
        MOE, FP8_FOLDER, {"first_last_layers_bf16": True},
        "first_last_layers_bf16 = true, but model.layers.0.mlp.experts.0.gate_proj of hf_checkpoint is in fp8_block",
    ),
    (
        MOE, FP8_FOLDER, {**FP8, "extra_high_precision_layers_megatron": [".linear_proj"]},
        'extra_high_precision_layers_megatron = [".linear_proj"], but model.layers.1.self_attn.o_proj of hf_checkpoint',
    ),
    (
        MOE, INT4_FOLDER, {"int4_qat": True, "int4_layers": ["down_proj"]},
        'int4_layers = ["down_proj"], but model.layers.0.mlp.experts.0.gate_proj of hf_checkpoint is in int4; leave it',
    ),
    (
        MOE, INT4_FOLDER, {"int4_qat": True, "int4_layers": ["."]},
        'int4_layers = ["."], but model.layers.0.self_attn.q_proj of hf_checkpoint is not in int4; leave it out',
    ),
    (
        MOE, FP8_FOLDER, {"lora_rank": 4},
        "lora_rank = 4, but engines get fp8_block, as hf_checkpoint is, and adapters are merged in rollout_dtype; set",
    ),
    (
        MOE, None, {"extra_high_precision_layers_hf": ["q_proj"]},
        'extra_high_precision_layers_hf = ["q_proj"], but it does nothing without a format',
    ),
    (MOE, None, {"int4_group_size": 32}, "int4_group_size = 32, but neither trainer nor engines compute in int4; set"),
    (
        MOE, FP8_FOLDER, {"int4_layers": ["."]},
        'int4_layers = ["."], but neither trainer nor engines compute in int4',
    ),
    (
        MOE, None, {"rollout_backend": "sglang", "sglang_quantization": "fp8"},
        "sglang_quantization = fp8, but weights are published in rollout_dtype, and a server that quantises them by "
        "itself takes no updates; set rollout_weight_format to fp8_block",
    ),
    (
        DENSE, None, {"int4_qat": True},
        'int4_layers = [".experts."], but it covers routed experts, and the model has none; set it to . for every',
    ),
    (
        MOE, None, {**FP8, "first_last_layers_bf16": True},
        "first_last_layers_bf16 = true, but it keeps all 2 layers out of fp8_block; lower num_layers_at_start_in_bf16",
    ),
    (
        MOE, None, {**FP8, "extra_high_precision_layers_hf": ["."]},
        'extra_high_precision_layers_hf = ["."], but no matrix of the model is left for fp8_block',
    ),
    (
        {**MOE, "moe_intermediate_size": 96}, None, {"int4_qat": True, "int4_group_size": 64},
        "int4_group_size = 64, but rows of model.layers.0.mlp.experts.0.down_proj have 96 numbers, which it does not",
    ),
    (
        MOE, None,
        {**FP8, **MEGATRON, "tensor_model_parallel_size": 2, "sequence_parallel": True, "actor_num_gpus_per_node": 2},
        "tensor_model_parallel_size = 2, but of model.layers.0.self_attn.k_proj, ranks hold 64 of its rows, which",
    ),
    (
        MOE, None,
        {
            "int4_qat": True, "int4_group_size": 128, **MEGATRON, "expert_tensor_parallel_size": 2,
            "tensor_model_parallel_size": 2, "sequence_parallel": True, "actor_num_gpus_per_node": 2,
        },
        "expert_tensor_parallel_size = 2, but of model.layers.0.mlp.experts.0.down_proj, ranks hold 64 of its columns",
    ),
    (
        MOE, None, {**FP8, "train_backend": "megatron", "extra_high_precision_layers_hf": [".q_proj"]},
        "train_backend = megatron, but Megatron multiplies model.layers.0.self_attn.k_proj and "
        "model.layers.0.self_attn.q_proj at once, and the first alone is in fp8_block; set extra_high",
    ),
    (
        {**MOE, "moe_intermediate_size": 48}, None,
        {
            **FP8, "train_backend": "megatron", "device": "cuda", "expert_tensor_parallel_size": 2,
            "tensor_model_parallel_size": 2, "sequence_parallel": True, "actor_num_gpus_per_node": 2,
        },
        "expert_tensor_parallel_size = 2, but model.layers.0.mlp.experts.0.gate_proj is 24 x 256 on a rank, and FP8",
    ),
    (
        MOE, None, {"int4_qat": True, "int4_layers": [".gate_proj"]},
        'int4_layers = [".gate_proj"], but model.layers.0.mlp.experts.gate_up_proj holds '
        "model.layers.0.mlp.experts.0.gate_proj, which is quantised, and model.layers.0.mlp.experts.0.up_proj, which",
    ),
    (
        MOE, {**FP8_FOLDER, "modules_to_not_convert": ["model.layers.1.mlp.experts.3.up_proj"]}, {},
        "hf_checkpoint = ",
    ),
    (
        MOE, {**INT4_FOLDER, "ignore": [r"re:.*experts\.[^01]\..*", "lm_head"]}, {},
        "hf_checkpoint = ",
    ),
    (
        MOE, None, {**FP8, "extra_high_precision_layers_hf": [".1.up_proj"]},
        'extra_high_precision_layers_hf = [".1.up_proj"], but model.layers.0.mlp.experts.gate_up_proj holds',
    ),
    (
        MOE, None,
        {**FP8, "low_precision_impl": "transformer_engine", "train_backend": "megatron", "device": "cuda"},
        "low_precision_impl = transformer_engine, but TransformerEngine is not installed here; install it where",
    ),
    (
        MOE, None, {**FP8, "te_precision_config_file": "/nothing.yaml"},
        "te_precision_config_file = /nothing.yaml, but it cannot be read (No such file or directory); name what",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "quantised", "changes", "expected"), REFUSED, ids=[case[3][:50] for case in REFUSED])
def test_what_says_otherwise_is_refused(
    tmp_path: pathlib.Path,
    model: dict[str, Any],
    quantised: dict[str, Any] | None,
    changes: dict[str, Any],
    expected: str,
) -> None:
    if "is not installed" in expected and is_installed("transformer_engine"):
        pytest.skip("TransformerEngine is installed")
    (found,) = faults(tmp_path, model, quantised, **changes)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("model", "quantised", "changes"),
    [
        (MOE, FP8_FOLDER, {}),
        (MOE, FP8_FOLDER, FP8),
        (MOE, FP8_FOLDER, {**FP8, "extra_high_precision_layers_hf": ["layers.0.self_attn."]}),
        (MOE, FP8_FOLDER, {"rollout_weight_format": "as_trained", "lora_rank": 4}),
        (MOE, INT4_FOLDER, {"int4_qat": True, "int4_group_size": 32, "int4_layers": [".experts."]}),
        (MOE, INT4_FOLDER, {}),
        (DENSE, None, {"int4_qat": True, "int4_layers": ["."]}),
        (MOE, None, {"int4_qat": True, "int4_layers": [".q_proj"], "train_backend": "megatron", "device": "cpu"}),
        (MOE, None, {**FP8, "train_backend": "fsdp", "extra_high_precision_layers_hf": [".q_proj"]}),
        (MOE, None, {**FP8, **MEGATRON, "expert_model_parallel_size": 2, "actor_num_gpus_per_node": 2}),
    ],
)
def test_what_agrees_is_taken(
    tmp_path: pathlib.Path, model: dict[str, Any], quantised: dict[str, Any] | None, changes: dict[str, Any]
) -> None:
    assert faults(tmp_path, model, quantised, **changes) == []


@pytest.mark.parametrize("file", ["/nothing.yaml", "base64:%"])
def test_a_file_of_precision_with_a_fault_is_one_fault(tmp_path: pathlib.Path, file: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE | {"architectures": ["Qwen3ForCausalLM"]}))
    found = examine(
        {
            **MINIMAL, **FP8, "train_backend": "megatron", "rollout_backend": "sglang", "device": "cuda",
            "rollout_dtype": "bfloat16", "save_hf_format": "rollout", "save_hf": str(tmp_path / "out"),
            "save_interval": 1, "hf_checkpoint": str(tmp_path), "te_precision_config_file": file,
        }
    )  # fmt: skip
    everything = [*found.faults, *environment_faults(found.settings), *model_faults(found.settings)]
    about = {str(fault) for fault in everything if fault.field == "te_precision_config_file"}
    assert len(about) == 1, everything
    assert [fault for fault in model_faults(found.settings) if fault.field != "te_precision_config_file"] == []
    assert run_of(found.settings) is None
    with pytest.raises(InvalidSetting, match="te_precision_config_file"):  # which `miles doctor` reports
        low_precision.look(Subject(found.settings, found.faults))
    assert [note for note in notes(found.settings) if "computes in" in note.text] == []
