"""Layouts that do not divide a model are refused, with everything that is wrong with them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.checks.model_layout import layout_faults, shape_differences
from miles.config.job import examine

DENSE = {"num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 6, "intermediate_size": 64}
EXPERTS = {**DENSE, "num_experts": 8, "moe_intermediate_size": 30}
LATENT = {**DENSE, "num_key_value_heads": 12, "kv_lora_rank": 16, "n_routed_experts": 8}


def faults(folder: pathlib.Path, model: dict[str, Any], **changes: Any) -> list[str]:
    (folder / "config.json").write_text(json.dumps(model))
    flat = {**MINIMAL, "train_backend": "megatron", "hf_checkpoint": str(folder), **changes}
    return [str(fault) for fault in layout_faults(examine(flat).settings)]


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (DENSE, {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 3}),
        (EXPERTS, {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (LATENT, {"expert_model_parallel_size": 8, "pipeline_model_parallel_size": 2}),
        (DENSE, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3}),
    ],
)
def test_a_layout_that_divides_the_model_has_no_fault(
    tmp_path: pathlib.Path, model: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert faults(tmp_path, model, **changes) == []


def test_lengths_beyond_the_models_positions_are_refused(tmp_path: pathlib.Path) -> None:
    model = {**DENSE, "max_position_embeddings": 4096}
    lengths = {"rollout_max_context_len": 5000, "rollout_max_response_len": 100}
    assert faults(tmp_path, model, **lengths) == [
        "rollout_max_context_len = 5000, but the model has 4096 positions (max_position_embeddings in its config.json);"
        " lower it"
    ]
    stretched = {**model, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 4096}}
    assert faults(tmp_path, stretched, **lengths) == []
    assert faults(tmp_path, DENSE, **lengths) == []


def test_an_engine_whose_gpus_do_not_divide_the_heads_is_refused(tmp_path: pathlib.Path) -> None:
    engine = {"rollout_backend": "sglang", "rollout_num_gpus_per_engine": 5}
    assert faults(tmp_path, DENSE, **engine) == [
        "rollout_num_gpus_per_engine = 5, but SGLang's tensor parallelism does not divide the model's 12 attention"
        " heads by it; choose one that does"
    ]


def test_every_size_that_does_not_divide_is_named_at_once(tmp_path: pathlib.Path) -> None:
    found = faults(
        tmp_path,
        EXPERTS,
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=4,
        expert_model_parallel_size=3,
        expert_tensor_parallel_size=4,
        sequence_parallel=False,
    )
    assert [fault.split(",")[0] for fault in found] == [
        "tensor_model_parallel_size = 8",
        "pipeline_model_parallel_size = 4",
        "expert_model_parallel_size = 3",
        "expert_tensor_parallel_size = 4",
        "sequence_parallel = false",
    ]


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        (DENSE, {"expert_model_parallel_size": 2}, "expert_model_parallel_size = 2, but the model has no experts"),
        (
            DENSE,
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
            "num_virtual_stages_per_pipeline_rank = 2, but it does not divide the 3 layers of a stage",
        ),
        (
            {**DENSE, "num_key_value_heads": 3},
            {"tensor_model_parallel_size": 2},
            "tensor_model_parallel_size = 2, but it and the model's 3 key/value heads do not divide each other",
        ),
        (
            LATENT,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "device": "cpu"},
            "tensor_model_parallel_size = 2, but multi-head latent attention is split over ranks by",
        ),
        (DENSE, {"mtp_num_layers": 1}, "mtp_num_layers = 1, but the model has 0 MTP layers"),
        (
            {**DENSE, "num_nextn_predict_layers": 1},
            {
                "mtp_num_layers": 1,
                "actor_num_gpus_per_node": 2,
                "pipeline_model_parallel_size": 2,
                "pipeline_model_parallel_layout": f"Et*{DENSE['num_hidden_layers']}|L",
            },
            f"pipeline_model_parallel_layout = Et*{DENSE['num_hidden_layers']}|L, but its last stage has no layer (t)",
        ),
    ],
)
def test_a_layout_that_does_not_fit_says_why(
    tmp_path: pathlib.Path, model: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    found = faults(tmp_path, model, **changes)
    assert len(found) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize("backend", ["fsdp", "megatron"])
@pytest.mark.parametrize("key", ["use_rollout_routing_replay", "observe_rollout_routing", "use_routing_replay"])
def test_a_model_without_experts_has_no_routing(tmp_path: pathlib.Path, backend: str, key: str) -> None:
    found = faults(tmp_path, DENSE, train_backend=backend, **{key: True})
    assert found == [f"{key} = true, but the model has no experts; leave it out"]
    assert faults(tmp_path, EXPERTS, train_backend=backend, **{key: True}) == []


def test_another_backend_has_no_layout(tmp_path: pathlib.Path) -> None:
    assert faults(tmp_path, {**DENSE, "num_hidden_layers": 7}, train_backend="fsdp") == []


def test_models_of_other_tensors_are_told_apart(tmp_path: pathlib.Path) -> None:
    for name, model in (("policy", DENSE), ("same", DENSE), ("deeper", {**DENSE, "num_hidden_layers": 8})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(model))
    policy = str(tmp_path / "policy")
    assert shape_differences(policy, str(tmp_path / "same")) == []
    assert shape_differences(policy, str(tmp_path / "deeper")) == ["num_hidden_layers is 8 instead of 6"]
    assert shape_differences(policy, str(tmp_path / "nowhere")) == []


def test_layers_that_predict_ahead_count_where_they_are_held(tmp_path: pathlib.Path) -> None:
    for name, layers in (("policy", {"num_nextn_predict_layers": 1}), ("teacher", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(DENSE | layers))
    folders = str(tmp_path / "policy"), str(tmp_path / "teacher")
    assert shape_differences(*folders) == []
    held = shape_differences(*folders, with_mtp=True)
    assert held == ["num_nextn_predict_layers is None instead of 1"]


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "Qwen3-235B", None])
def test_a_name_of_the_models_family_fits_it(tmp_path: pathlib.Path, name: str | None) -> None:
    assert faults(tmp_path, {**EXPERTS, "model_type": "qwen3_moe"}, model_name=name) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("deepseekv4", "deepseek_v4"),
        ("kimi_k25", "kimi_k25"),
        ("kimi_k2", "deepseek_v3"),
        ("moonlight", "deepseek_v3"),
        ("minimax_m2", "minimax_m2"),
        ("glm4moe", "glm4_moe"),
        ("mimo", "qwen2"),
    ],
)
def test_names_that_scripts_pass_fit_the_types_of_their_models(tmp_path: pathlib.Path, name: str, kind: str) -> None:
    assert faults(tmp_path, {**EXPERTS, "model_type": kind}, model_name=name) == []


def test_a_name_of_another_family_is_refused(tmp_path: pathlib.Path) -> None:
    (fault,) = faults(tmp_path, {**EXPERTS, "model_type": "qwen3_moe"}, model_name="deepseekv3")
    assert fault.startswith("model_name = deepseekv3, but hf_checkpoint ")
    assert "is a qwen3_moe" in fault


def test_settings_of_experts_need_a_model_with_experts(tmp_path: pathlib.Path) -> None:
    settings = {"moe_z_loss_coeff": 0.1, "moe_router_freeze_gate": True, "moe_grouped_gemm": True}
    assert [fault.split(",")[0] for fault in faults(tmp_path, DENSE, **settings)] == [
        "moe_z_loss_coeff = 0.1",
        "moe_router_freeze_gate = true",
    ]
    assert faults(tmp_path, EXPERTS, **settings) == []


def test_uneven_stages_are_checked_against_the_models_layers(tmp_path: pathlib.Path) -> None:
    uneven = {"pipeline_model_parallel_size": 3, "decoder_last_pipeline_num_layers": 2}
    assert faults(tmp_path, DENSE, **uneven) == []
    assert faults(tmp_path, {**DENSE, "num_hidden_layers": 7}, **uneven) == [
        "decoder_last_pipeline_num_layers = 2, but it leaves 5 of the model's 7 layers for 2 other stages; choose one"
        " that leaves as many for each"
    ]


def test_latent_attention_is_recomputed_where_there_is_some(tmp_path: pathlib.Path) -> None:
    part = {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}
    assert faults(tmp_path, LATENT, **part) == []
    assert faults(tmp_path, DENSE, **part) == [
        "recompute_modules = mla_up_proj, but the model has no multi-head latent attention; leave it out"
    ]
