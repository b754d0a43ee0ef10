"""The megatron backend on GPUs: TransformerEngine's layers, 16-bit training, NCCL between ranks."""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
import time
from typing import Any

import pytest
import torch
from megatron_kit import SUPPORT, run_cases, run_python
from megatron_models import EXPERTS, FAMILIES, TOP_K, architecture, write_model
from recorded_reference import FLAGS as RECORDING
from recorded_reference import recorded_in
from safetensors.torch import load_file

from miles.config.checks.known_models import BRIDGED, OWN_ARCHITECTURES
from miles.drafts.recordings import read

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"),
]
needs_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="TransformerEngine is not installed"
)
needs_deepep = pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="DeepEP is not installed")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

STEP = {"lr": 1.0, "adam_eps": 1.0, "clip_grad": 0.0, "train_dtype": "bfloat16"}
"""One step of Adam with a large epsilon, which is proportional to the gradient."""
REPLAY = {"use_rollout_routing_replay": True}


def case(name: str, model: pathlib.Path, routing: bool = False, **flags: Any) -> dict[str, Any]:
    """One training step of a tiny model on GPUs."""
    settings = {**STEP, "train_backend": "megatron", "device": "cuda", "distributed_backend": "nccl", **flags}
    experts = [EXPERTS, 4, TOP_K] if routing else None
    return {"name": name, "model": str(model), "flags": settings, "routing": experts, "steps": 1}


def assert_trained_alike(out: pathlib.Path, left: str, right: str, tolerance: float = 0.05) -> None:
    """Equal losses and weights up to 16-bit rounding, relative to how far the step went."""
    metrics = [json.loads((out / f"{name}.json").read_text())["metrics"][0] for name in (left, right)]
    for key in ("train/pg_loss", "train/grad_norm", "train/train_rollout_logprob_abs_diff"):
        assert metrics[0][key] == pytest.approx(metrics[1][key], rel=tolerance, abs=0.02), key
    weights = [load_file(out / f"{name}.safetensors") for name in (left, right)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor.float(), weights[1][name].float(), rtol=tolerance, atol=tolerance, msg=name)


@needs_engine
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen3-MoE"])
def test_both_kinds_of_layers_and_the_fsdp_backend_train_alike(tmp_path: pathlib.Path, family: str) -> None:
    """With experts prescribed: rounded to 16 bits, the routers of two kinds of layers choose others for some tokens."""
    model = write_model(family, tmp_path / "model")
    routing: dict[str, Any] = {"routing": True, **REPLAY} if family == "Qwen3-MoE" else {}
    run_cases(
        [
            case("fsdp", model, train_backend="fsdp", share_prompts=False, **routing),
            case("local", model, transformer_impl="local", **routing),
            case("engine", model, transformer_impl="transformer_engine", **routing),
        ],
        tmp_path,
        megatron=False,
    )
    assert_trained_alike(tmp_path, "local", "engine")
    assert_trained_alike(tmp_path, "fsdp", "engine")


@needs_engine
def test_recorded_routing_is_replayed_in_grouped_experts(tmp_path: pathlib.Path) -> None:
    model = write_model("Qwen3-MoE", tmp_path / "model")
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    run_cases(
        [
            case("fsdp", model, routing=True, train_backend="fsdp", share_prompts=False, **REPLAY),
            case("engine", model, routing=True, **REPLAY),
            case("recomputed", model, routing=True, **REPLAY, **recompute),
        ],
        tmp_path,
        megatron=False,
    )
    assert_trained_alike(tmp_path, "fsdp", "engine")
    assert_trained_alike(tmp_path, "engine", "recomputed")
    metrics = json.loads((tmp_path / "engine.json").read_text())["metrics"][0]
    assert metrics["train/routing_difference"] > 0.8  # the recorded experts are random


@needs_engine
@pytest.mark.parametrize("family", ["GLM-4.5, MTP", "MiMo"])
def test_mtp_layers_of_both_kinds_train_alike(tmp_path: pathlib.Path, family: str) -> None:
    """In GLM-4.5's MTP layer the two choose other experts for some tokens, so its loss is looked at alone."""
    model = write_model(family, tmp_path / "model")
    kinds = {name: {"transformer_impl": name} for name in ("local", "transformer_engine")}
    learns = {"mtp_num_layers": 1, "enable_mtp_training": True}
    cases = [{**case(name, model, **learns, **flags), "save_hf": True} for name, flags in kinds.items()]
    run_cases(cases, tmp_path, megatron=False)
    local, engine = (json.loads((tmp_path / f"{name}.json").read_text())["metrics"][0] for name in kinds)
    assert engine["train/mtp_loss"] == pytest.approx(local["train/mtp_loss"], rel=0.02)
    assert abs(engine["train/mtp_acceptance"] - local["train/mtp_acceptance"]) < 0.05
    before = load_file(model / "model.safetensors")
    after = [load_file(tmp_path / name / "hf" / "model.safetensors") for name in kinds]
    trained = [name for name in before if "eh_proj" in name or ".mtp_layers." in name]
    assert trained
    assert not any(torch.equal(before[name].to(after[1][name].dtype), after[1][name]) for name in trained)
    if family == "MiMo":
        for name in trained:
            torch.testing.assert_close(after[0][name], after[1][name], rtol=0.05, atol=0.05, msg=name)


@needs_engine
def test_both_backends_record_alike_for_a_draft(tmp_path: pathlib.Path) -> None:
    model = write_model("Llama", tmp_path / "model")
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    kinds: dict[str, dict[str, Any]] = {"fsdp": {"train_backend": "fsdp"}, "engine": {}, "recomputed": recompute}
    roots = {name: recorded_in(tmp_path / f"{name}-recordings") for name in kinds}
    run_cases(
        [case(name, model, **RECORDING, **roots[name], **flags) for name, flags in kinds.items()],
        tmp_path,
        megatron=False,
    )
    fsdp, engine, recomputed = (read(tmp_path / f"{name}-recordings", 0) for name in kinds)
    assert len(fsdp) == 16
    for ours, theirs, again in zip(engine, fsdp, recomputed, strict=True):
        assert torch.equal(ours.tokens_T, theirs.tokens_T)
        assert ours.hidden_TD.keys() == theirs.hidden_TD.keys()
        for layer, hidden_TD in ours.hidden_TD.items():
            difference = (hidden_TD.float() - theirs.hidden_TD[layer].float()).abs().mean()
            assert difference < 0.03 * hidden_TD.float().abs().mean(), layer
            assert torch.equal(hidden_TD, again.hidden_TD[layer])
        assert (ours.top_log_probs_RK - theirs.top_log_probs_RK).abs().mean() < 0.05


@needs_engine
def test_critic_teacher_and_old_actors_are_those_of_the_fsdp_backend(tmp_path: pathlib.Path) -> None:
    model, teacher = (write_model("Llama", tmp_path / name, seed) for seed, name in enumerate(("model", "teacher")))
    roles = {
        "advantage_estimator": "ppo",
        "use_opd": True,
        "opd_type": "megatron",
        "opd_teacher_load": str(teacher),
        "keep_old_actor": True,
        "max_weight_staleness": 2,
    }
    cases = [case(name, model, train_backend=name, **roles) for name in ("fsdp", "megatron")]
    run_cases([{**each, "steps": 2, "off_policy": True} for each in cases], tmp_path, megatron=False)
    fsdp, megatron = (json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("fsdp", "megatron"))
    for key in ("train/value_loss", "train/opd_reverse_kl"):
        assert fsdp[0][key] == pytest.approx(megatron[0][key], rel=0.05, abs=0.02), key
    assert fsdp[1]["train/old_actor_ratio"] == megatron[1]["train/old_actor_ratio"] > 0.2
    assert all(math.isfinite(value) for value in (*fsdp[1].values(), *megatron[1].values()))


@needs_engine
def test_every_family_of_the_bridge_converts_both_ways(tmp_path: pathlib.Path) -> None:
    """Prints what each family came to."""
    from megatron_families import write_expected

    scale = {}
    for family in FAMILIES:
        if architecture(family) in BRIDGED | OWN_ARCHITECTURES:
            folder = write_model(family, tmp_path / family.replace(", ", "-").replace(" ", "-"))
            scale[folder.name] = write_expected(folder)
    output = run_python([str(SUPPORT / "megatron_families.py"), str(tmp_path)], megatron=False, timeout_s=800)
    lines = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    print(json.dumps(lines, indent=1))
    failed = [line for line in lines if "error" in line or line["logits"] > 0.1 * scale[line["folder"]]]
    assert failed == []


OFFLOAD: dict[str, Any] = {"optimizer_cpu_offload": True}


@needs_engine
@pytest.mark.parametrize(
    "changes",
    [
        OFFLOAD,
        {**OFFLOAD, "overlap_cpu_optimizer_d2h_h2d": True},
        {"use_precision_aware_optimizer": True},
        {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
    ],
    ids=["offloaded", "overlapped", "own masters", "16-bit moments"],
)
def test_state_of_another_place_or_type_trains_alike(tmp_path: pathlib.Path, changes: dict[str, Any]) -> None:
    """Also with everything swapped to host memory between calls, and through a checkpoint to the plain optimizer."""
    model = write_model("Qwen3", tmp_path / "model")
    plain = {"use_distributed_optimizer": True}
    cases = [
        case("plain", model, **plain),
        {**case("changed", model, **changes), "swap": True},
        {**case("resumed", model, **changes), "save_at": 1},
        {**case("resumed", model, **plain), "steps": 2},
        {**case("resumed back", model, **plain), "save_at": 1},
        {**case("resumed back", model, **changes), "steps": 2},
        {**case("two steps", model, **plain), "steps": 2},
    ]
    run_cases(cases, tmp_path, megatron=False)
    moved = {name: json.loads((tmp_path / f"{name}.json").read_text())["moved"] for name in ("plain", "changed")}
    print(changes, moved)
    assert_trained_alike(tmp_path, "plain", "changed")
    for name in ("resumed", "resumed back"):
        weights = [load_file(tmp_path / f"{each}.safetensors") for each in ("two steps", name)]
        for key, tensor in weights[0].items():
            torch.testing.assert_close(
                tensor.float(), weights[1][key].float(), rtol=0.05, atol=0.05, msg=f"{name} {key}"
            )


@needs_engine
def test_offloading_frees_gpu_memory(tmp_path: pathlib.Path) -> None:
    """Bytes on the GPU between steps, as swapping them out tells: 12 a parameter less for masters and moments."""
    model = write_model("Qwen3", tmp_path / "model")
    flags: dict[str, dict[str, Any]] = {"here": {"use_distributed_optimizer": True}, "there": OFFLOAD}
    run_cases([{**case(n, model, **each), "swap": True} for n, each in flags.items()], tmp_path, megatron=False)
    held = {name: json.loads((tmp_path / f"{name}.json").read_text())["moved"][-1] for name in flags}
    parameters = sum(tensor.numel() for tensor in load_file(tmp_path / "here.safetensors").values())
    assert held["here"] - held["there"] == pytest.approx(12 * parameters, rel=0.05)


@needs_engine
@pytest.mark.parametrize("family", ["Qwen3-MoE", "GLM-4.5"])
def test_experts_train_alike_by_every_kind_of_kernels(tmp_path: pathlib.Path, family: str) -> None:
    """With experts prescribed; GLM-4.5 has shared experts, and a dense layer before the others."""
    model = write_model(family, tmp_path / "model")
    kinds: dict[str, dict[str, Any]] = {
        "grouped": {},
        "single": {"moe_grouped_gemm": False},
        "unfused": {"moe_permute_fusion": False},
        "double": {"moe_router_dtype": "fp64"},
        **({"overlapped": {"moe_shared_expert_overlap": True}} if family == "GLM-4.5" else {}),
    }
    layers = 4 if family == "Qwen3-MoE" else 3
    cases = [case(name, model, routing=True, **REPLAY, **flags) for name, flags in kinds.items()]
    run_cases([{**each, "routing": [EXPERTS, layers, TOP_K]} for each in cases], tmp_path, megatron=False)
    for name in kinds.keys() - {"grouped"}:
        assert_trained_alike(tmp_path, "grouped", name)
    experts = {
        name: [part for part in json.loads((tmp_path / f"{name}.json").read_text())["parameters"] if "experts." in part]
        for name in ("grouped", "single")
    }
    assert any("local_experts" in part for part in experts["single"])
    assert not any("local_experts" in part for part in experts["grouped"])


@needs_engine
def test_a_checkpoint_of_single_experts_goes_on_with_grouped_ones(tmp_path: pathlib.Path) -> None:
    model = write_model("Qwen3-MoE", tmp_path / "model")
    single = case("single", model, routing=True, moe_grouped_gemm=False, **REPLAY)
    grouped = case("grouped", model, routing=True, load=str(tmp_path / "single" / "checkpoints"), **REPLAY)
    run_cases([{**single, "steps": 2, "save_at": 1}, {**grouped, "steps": 2}], tmp_path, megatron=False)
    left, right = (load_file(tmp_path / f"{name}.safetensors") for name in ("single", "grouped"))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor.float(), right[name].float(), rtol=0.05, atol=0.05, msg=name)


@needs_engine
def test_fused_routers_have_the_losses_of_unfused_ones(tmp_path: pathlib.Path) -> None:
    model = write_model("Qwen3-MoE", tmp_path / "model")
    losses = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.5, "max_tokens_per_gpu": 1024}
    cases = [case(name, model, moe_router_fusion=name == "fused", **losses) for name in ("fused", "plain")]
    run_cases([{**each, "reward": 1.0} for each in cases], tmp_path, megatron=False)
    norms = [json.loads((tmp_path / f"{name}.json").read_text())["metrics"][0] for name in ("fused", "plain")]
    assert norms[0]["train/grad_norm"] == pytest.approx(norms[1]["train/grad_norm"], rel=0.05)
    assert norms[0]["train/grad_norm"] > 0.1


@needs_engine
@pytest.mark.parametrize("module", ["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"])
def test_parts_of_layers_are_recomputed_to_the_same(tmp_path: pathlib.Path, module: str) -> None:
    model = write_model("GLM-4.5", tmp_path / "model")
    parts = {"recompute_granularity": "selective", "recompute_modules": [module]}
    cases = [case("kept", model, routing=True, **REPLAY), case("recomputed", model, routing=True, **REPLAY, **parts)]
    run_cases([{**each, "routing": [EXPERTS, 3, TOP_K]} for each in cases], tmp_path, megatron=False)
    assert_trained_alike(tmp_path, "kept", "recomputed", tolerance=0.01)


@needs_two
@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1},
        {"context_parallel_size": 2},
    ],
    ids=["tp2", "ep2", "pp2", "uneven", "cp2"],
)
def test_two_gpus_train_as_one_does(tmp_path: pathlib.Path, layout: dict[str, Any]) -> None:
    model = write_model("Qwen3-MoE", tmp_path / "model")
    run_cases([case("one", model, routing=True, **REPLAY)], tmp_path, megatron=False)
    began = time.monotonic()
    run_cases([case("two", model, routing=True, **REPLAY, **layout)], tmp_path, ranks=2, megatron=False)
    print(f"{layout}: {time.monotonic() - began:.0f} s")
    assert_trained_alike(tmp_path, "one", "two")


@needs_engine
def test_adapters_are_trained_beside_both_kinds_of_layers(tmp_path: pathlib.Path) -> None:
    model = write_model("Llama", tmp_path / "model")
    adapted = {"lora_rank": 4, "lora_alpha": 8, "rollout_dtype": "bfloat16"}
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    run_cases(
        [
            case("local", model, transformer_impl="local", **adapted),
            case("engine", model, **adapted),
            case("recomputed", model, **adapted, **recompute),
        ],
        tmp_path,
        megatron=False,
    )
    assert_trained_alike(tmp_path, "local", "engine")
    assert_trained_alike(tmp_path, "engine", "recomputed", tolerance=0.01)


WIDE = {
    "hidden_size": 640,
    "intermediate_size": 1024,
    "head_dim": 128,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.02,
}
"""Sizes whose matrices, also within those that Megatron-Core joins, are whole numbers of blocks."""
FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise", "fp8_block_scales": "power_of_two"}


def low_case(name: str, folder: pathlib.Path, **flags: Any) -> dict[str, Any]:
    """A step of a wide model that leaves its log-probabilities behind."""
    model = folder / "model"
    is_moe = "num_experts" in json.loads((model / "config.json").read_text())
    routing: dict[str, Any] = {"routing": True, **REPLAY} if is_moe else {}
    file = str(folder / f"{name}-{{rollout_id}}-{{rank}}.pt")
    return case(name, model, save_debug_train_data=file, rollout_dtype="bfloat16", **routing, **flags)


def far(folder: pathlib.Path, *names: str) -> float:
    """The mean difference of two cases' log-probabilities."""
    files = (torch.load(folder / f"{name}-0-0.pt")["samples"] for name in names)
    one, two = (torch.cat([sample["log_probs"] for sample in samples]) for samples in files)
    return float((one - two).abs().mean())


@needs_engine
@pytest.mark.parametrize("family", ["Qwen3", "Qwen3-MoE"])
def test_kernels_of_fp8_compute_as_emulation_does(tmp_path: pathlib.Path, family: str) -> None:
    """Closer to it than FP8 is to 16 bits, whose own rounding already changes how inputs round to 8."""
    experts = {"moe_intermediate_size": 512} if family == "Qwen3-MoE" else {}
    write_model(family, tmp_path / "model", **WIDE, **experts)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    kinds: dict[str, dict[str, Any]] = {
        "kernels": {**FP8, "low_precision_impl": "transformer_engine"},
        "emulated": {**FP8, "low_precision_impl": "emulated"},
        "recomputed": {**FP8, **recompute},
        "mostly": {**FP8, "first_last_layers_bf16": True, "extra_high_precision_layers_hf": ["self_attn"]},
        "plain": {},
    }
    if experts:
        kinds["single"] = {**FP8, "moe_grouped_gemm": False}
    run_cases([low_case(name, tmp_path, **flags) for name, flags in kinds.items()], tmp_path, megatron=False)
    rounding = far(tmp_path, "emulated", "plain")
    print(family, rounding, {name: far(tmp_path, "emulated", name) for name in kinds})
    assert far(tmp_path, "emulated", "kernels") < 0.75 * rounding
    assert far(tmp_path, "kernels", "recomputed") < rounding / 10
    assert 0 < far(tmp_path, "mostly", "plain") < rounding
    assert_trained_alike(tmp_path, "emulated", "kernels", tolerance=0.1)
    assert_trained_alike(tmp_path, "kernels", "recomputed", tolerance=0.01)
    if experts:
        assert far(tmp_path, "kernels", "single") < 0.75 * rounding


@needs_two
@needs_engine
@pytest.mark.parametrize(
    "layout",
    [{"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"expert_model_parallel_size": 2}],
    ids=["tp2", "ep2"],
)
def test_kernels_of_fp8_compute_on_two_gpus_as_on_one(tmp_path: pathlib.Path, layout: dict[str, Any]) -> None:
    write_model("Qwen3-MoE", tmp_path / "model", **WIDE, moe_intermediate_size=512)
    cases = [low_case("one", tmp_path, **FP8), low_case("plain", tmp_path)]
    run_cases(cases, tmp_path, megatron=False)
    run_cases([low_case("two", tmp_path, **FP8, **layout)], tmp_path, ranks=2, megatron=False)
    assert_trained_alike(tmp_path, "one", "two", tolerance=0.1)
    if layout.get("tensor_model_parallel_size"):  # each of the others has the log-probabilities of some samples
        assert far(tmp_path, "one", "two") < 0.75 * far(tmp_path, "one", "plain")


@needs_engine
@pytest.mark.parametrize("family", ["Qwen3", "Qwen3-MoE"])
def test_int4_weights_are_rounded_in_both_kinds_of_layers(tmp_path: pathlib.Path, family: str) -> None:
    experts = {"moe_intermediate_size": 512} if family == "Qwen3-MoE" else {}
    write_model(family, tmp_path / "model", **WIDE, **experts)
    four_bits: dict[str, Any] = {"int4_qat": True, "int4_layers": ["."]}
    kinds: dict[str, dict[str, Any]] = {
        "engine": four_bits,
        "local": {**four_bits, "transformer_impl": "local"},
        "plain": {},
    }
    if experts:
        kinds["single"] = {**four_bits, "moe_grouped_gemm": False}
    run_cases([low_case(name, tmp_path, **flags) for name, flags in kinds.items()], tmp_path, megatron=False)
    rounding = far(tmp_path, "engine", "plain")
    print(family, rounding, {name: far(tmp_path, "engine", name) for name in kinds})
    for name in kinds.keys() - {"engine", "plain"}:
        assert far(tmp_path, "engine", name) < rounding / 3, name
        assert_trained_alike(tmp_path, "engine", name)


@needs_two
@needs_engine
@needs_deepep
def test_deepep_sends_tokens_as_alltoall_does(tmp_path: pathlib.Path) -> None:
    model = write_model("Qwen3-MoE", tmp_path / "model")
    split = {"expert_model_parallel_size": 2}
    flex = {"moe_token_dispatcher_type": "flex", "moe_enable_deepep": True}
    cases = [case("alltoall", model, routing=True, **REPLAY, **split)]
    cases.append(case("flex", model, routing=True, **REPLAY, **split, **flex))
    run_cases(cases, tmp_path, ranks=2, megatron=False)
    assert_trained_alike(tmp_path, "alltoall", "flex")
