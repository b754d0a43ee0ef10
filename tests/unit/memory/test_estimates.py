"""The formulas of trainer, engines, host and disk, on round numbers and on DeepSeek-V3."""

from __future__ import annotations

import json
import pathlib
import struct
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.launcher.placement import placement_of, settings_of
from miles.memory.activations import activation_parts, layer_elements
from miles.memory.amount import GIB, Part, When, number, peak, size
from miles.memory.disk import disk_part
from miles.memory.engines import engine_parts, static_fraction
from miles.memory.host import versions_part
from miles.memory.least import least_host_memory
from miles.memory.megatron import Layout, megatron_parts, rank_parameters, stage_layers
from miles.memory.model import PLAIN_HEADS, shape_of
from miles.memory.parameters import model_parameters
from miles.memory.remedy import fitting_layout, smallest_server
from miles.memory.report import report_of, trainer_parts
from miles.memory.run import Run, run_of
from miles.memory.samples import longest_sample, queue_part, rank_samples_part, rollout_samples_part
from miles.placement.nodes import parse_cluster
from miles.services.trainer.backends.fsdp.model import scoring_head

DENSE = {
    "model_type": "llama", "hidden_size": 1000, "num_hidden_layers": 10, "vocab_size": 50_000,
    "num_attention_heads": 10, "num_key_value_heads": 5, "intermediate_size": 4000, "tie_word_embeddings": True,
}  # fmt: skip
DEEPSEEK = pathlib.Path(__file__).parents[2] / "support/deepseek_v3.json"
H200 = int(139.6 * GIB)


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    return tmp_path


def run(model: pathlib.Path, device: str = "cpu", **changes: Any) -> Run:
    config = JobConfig.from_flat({**MINIMAL, "hf_checkpoint": str(model), **changes}).resolve(device)  # type: ignore[arg-type]
    found = run_of(settings_of(config))
    assert found is not None
    return found


def deepseek(tmp_path: pathlib.Path, **changes: Any) -> Run:
    (tmp_path / "config.json").write_text(DEEPSEEK.read_text())
    megatron = {"train_backend": "megatron", "rollout_backend": "sglang", "n_samples_per_prompt": 8}
    return run(tmp_path, "cuda", **{**megatron, "rollout_batch_size": 32, **changes})


def named(parts: list[Part], name: str) -> int:
    return sum(part.bytes for part in parts if part.name == name)


def total(found: Run) -> int:
    return found.policy.parameters.total


def test_fsdp_shards_weights_gradients_and_moments(model: pathlib.Path) -> None:
    one, two = (trainer_parts(run(model, "cuda", actor_num_gpus_per_node=ranks))[0] for ranks in (1, 2))
    count = total(run(model))
    assert named(one, "policy weights") == 4 * count
    assert named(one, "policy optimizer") == 8 * count
    assert named(one, "working weights") == 2 * count
    assert named(two, "policy gradients") == 2 * count
    assert named(two, "policy optimizer") == 4 * count
    assert named(two, "gathered units") < 2 * count
    narrow = trainer_parts(run(model, "cuda", actor_num_gpus_per_node=1, keep_fp32_master=False))[0]
    assert named(narrow, "policy weights") == named(narrow, "policy gradients") == 2 * count
    assert named(narrow, "working weights") == 0


def test_roles_and_adapters_have_their_own_parts(model: pathlib.Path) -> None:
    count, ppo = total(run(model)), trainer_parts(run(model, advantage_estimator="ppo", use_kl_loss=True))[0]
    assert named(ppo, "critic weights") == named(ppo, "policy weights")  # tied, so that there is no head to leave out
    assert named(ppo, "reference") == 4 * count
    adapted = trainer_parts(run(model, lora_rank=8))[0]
    assert named(adapted, "policy weights, frozen") == 4 * count
    assert 0 < named(adapted, "adapter and optimizer") < count
    offloaded = trainer_parts(run(model, "cuda", actor_num_gpus_per_node=2, fsdp_cpu_offload=True))
    assert named(offloaded[0], "policy weights") == 0
    assert named(offloaded[1], "policy weights") == 2 * count


def test_a_parked_trainer_is_in_host_memory_while_engines_work(model: pathlib.Path) -> None:
    found = run(model, "cuda", rollout_backend="sglang", colocate=True, actor_num_gpus_per_node=2)
    device, host = trainer_parts(found)
    assert {part.when for part in device} == {When.TRAINING}
    assert named(host, "parked trainer") == 12 * total(found) // 2
    kept = run(model, "cuda", rollout_backend="sglang", colocate=True, actor_num_gpus_per_node=2, offload_train=False)
    assert When.ALWAYS in {part.when for part in trainer_parts(kept)[0]}


def test_stages_take_turns_with_virtual_ones() -> None:
    shape = shape_of({**DENSE, "num_hidden_layers": 8})
    assert shape is not None
    assert stage_layers(shape, Layout(2, pipeline=2), 1) == [4, 5, 6, 7]
    assert stage_layers(shape, Layout(2, pipeline=2, virtual=2), 1) == [2, 3, 6, 7]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(8, tensor=2, pipeline=2),
        Layout(8, pipeline=4, virtual=2),
        Layout(16, tensor=4, pipeline=2, expert=8, expert_tensor=1),
    ],
)
def test_ranks_hold_the_model_together(layout: Layout) -> None:
    """Nothing is lost between stages, and what a rank holds twice is small."""
    shape = shape_of({**DENSE, "tie_word_embeddings": False, "num_hidden_layers": 16, "num_key_value_heads": 10,
                      "num_experts": 8, "moe_intermediate_size": 500, "num_experts_per_tok": 2})  # fmt: skip
    assert shape is not None
    stages = [rank_parameters(shape, layout, stage) for stage in range(layout.pipeline)]
    held = sum((own.total - own.experts) * layout.tensor for own in stages)
    held += sum(own.experts * layout.expert * layout.expert_tensor for own in stages)
    assert model_parameters(shape).total <= held < 1.01 * model_parameters(shape).total


def test_the_distributed_optimizer_shards_over_replicas_and_experts_over_theirs(tmp_path: pathlib.Path) -> None:
    sizes = {"actor_num_nodes": 16, "actor_num_gpus_per_node": 8, "tensor_model_parallel_size": 8, "host": "10.0.0.1"}
    found = deepseek(tmp_path, **sizes, expert_model_parallel_size=64, use_distributed_optimizer=True)
    own = rank_parameters(found.policy.shape, Layout(128, tensor=8, expert=64, expert_tensor=1), 0)  # type: ignore[arg-type]
    assert own.experts == 58 * 256 * 3 * 7168 * 2048 // 64
    parts, _ = megatron_parts(found, 0)
    assert named(parts, "policy weights") == 2 * own.total
    assert named(parts, "policy gradients") == 4 * own.total
    assert named(parts, "policy optimizer") == (own.total - own.experts) * 12 // 16 + own.experts * 12 // 2
    plain, _ = megatron_parts(deepseek(tmp_path, **sizes, expert_model_parallel_size=64), 0)
    assert named(plain, "policy optimizer") == 12 * own.total


def test_offloading_moves_the_optimizer_to_host_memory(tmp_path: pathlib.Path) -> None:
    sizes = {"actor_num_nodes": 16, "actor_num_gpus_per_node": 8, "host": "10.0.0.1", "expert_model_parallel_size": 64}
    here, _ = megatron_parts(deepseek(tmp_path, **sizes, use_distributed_optimizer=True), 0)
    state = named(here, "policy optimizer")
    device, host = megatron_parts(deepseek(tmp_path, **sizes, optimizer_cpu_offload=True), 0)
    assert named(device, "policy optimizer") == 0
    assert named(host, "policy optimizer on the host") == state * 16 // 12
    small = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    device, _ = megatron_parts(deepseek(tmp_path, **sizes, **small), 0)
    assert named(device, "policy optimizer") == state * 8 // 12


def test_recomputation_keeps_the_inputs_of_layers_alone(model: pathlib.Path) -> None:
    def activations(**changes: Any) -> int:
        return named(activation_parts(run(model, "cuda", actor_num_gpus_per_node=1, **changes)), "activations")

    whole, few = activations(), activations(gradient_checkpointing=True)
    assert whole > 5 * few
    dynamic = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 4096}
    assert activations(**dynamic) == pytest.approx(whole * 4096 / 1040)
    assert "max_tokens_per_gpu = 4096" in activation_parts(run(model, **dynamic))[0].formula


def test_logits_are_split_over_tensor_parallel_ranks(tmp_path: pathlib.Path) -> None:
    one, eight = (
        activation_parts(
            deepseek(tmp_path, tensor_model_parallel_size=size, actor_num_gpus_per_node=8, rollout_max_context_len=4096,
                     micro_batch_size=1, log_probs_chunk_size=1024)
        )
        for size in (1, 8)
    )  # fmt: skip
    assert named(one, "logits") == 4096 * 129280 * 2 == 8 * named(eight, "logits")
    assert named(one, "log-probabilities") == 3 * 1024 * 129280 * 4


def test_sglang_splits_weights_and_fills_what_its_fraction_leaves(tmp_path: pathlib.Path) -> None:
    found = deepseek(tmp_path, rollout_num_gpus=16, rollout_num_gpus_per_engine=16, rollout_weight_format="as_trained")
    assert found.published.bytes == total(found) * 2 + 58 * 256 * 2  # routers' biases are in float32
    parts = engine_parts(found, H200)
    weights = named(parts, "engine weights")
    assert weights == found.published.bytes // 16
    assert sum(part.bytes for part in parts) == pytest.approx(H200, abs=8)
    assert 0.88 < static_fraction(found, H200) < 0.92
    half = deepseek(
        tmp_path, sglang_mem_fraction_static=0.7, rollout_num_gpus_per_engine=16, rollout_weight_format="as_trained"
    )
    assert named(engine_parts(half, H200), "KV cache") == int(0.7 * H200) - weights
    # A token of latent attention is 61 × (512 + 64) elements on every rank.
    assert f"tokens of {61 * 576 * 2} bytes" in engine_parts(found, H200)[1].formula


def test_the_torch_engine_keeps_keys_and_values_of_every_request(model: pathlib.Path) -> None:
    parts = engine_parts(run(model, max_running_requests=4, rollout_max_context_len=128))
    assert named(parts, "KV cache") == 4 * 128 * (10 * 2 * 5 * 100) * 4


def test_routing_is_queued_with_the_samples(tmp_path: pathlib.Path) -> None:
    replayed = {"use_rollout_routing_replay": True, "rollout_max_context_len": 32768}
    saved = {"save_interval": 1}
    plain, routed = (queue_part(deepseek(tmp_path, **saved, **more)) for more in ({}, replayed))
    assert queue_part(deepseek(tmp_path, num_rollout=99)).bytes == 50 * plain.bytes  # one checkpoint, at the end
    assert "of routing in 58 layers" in routed.formula
    assert routed.bytes == 32 * 8 * 2 * longest_sample(deepseek(tmp_path, **replayed)).payload_bytes
    assert routed.bytes > 32 * 8 * 2 * 32767 * 58 * 8  # one byte each: there are 256 experts
    assert plain.bytes < routed.bytes


def test_ranks_and_rollouts_hold_their_share_of_long_samples(tmp_path: pathlib.Path) -> None:
    replayed = {"use_rollout_routing_replay": True, "rollout_max_context_len": 32768, "rollout_num_workers": 4}
    found = deepseek(tmp_path, **replayed)
    sample = longest_sample(found)
    first, other = (rank_samples_part(found, rank).bytes for rank in (0, 1))
    assert first > 32 * 8 * sample.payload_bytes > other > 32 * sample.routing_bytes  # of 8 replicas
    assert rollout_samples_part(found).bytes == (32 // 4 + 1) * 8 * sample.payload_bytes


@pytest.mark.parametrize(("ranks", "copies"), [(1, 1), (2, 2)])
def test_versions_that_are_compared_count_where_changes_are_sent(model: pathlib.Path, ranks: int, copies: int) -> None:
    layout = {"actor_num_gpus_per_node": ranks, "update_weight_disk_dir": str(model)}
    plain = least_host_memory(run(model, **layout))
    found = run(model, **layout, update_weight_transfer_mode="disk_delta")
    changes = least_host_memory(found)
    assert changes.bytes - plain.bytes == copies * 4 * total(found)  # rank 0 has all of it, and each of two its shards
    assert "last version" in changes.formula


def test_what_a_machine_needs_at_least_and_writes(model: pathlib.Path) -> None:
    found = run(model, save_interval=3, save_hf="out/{rollout_id}")
    count = total(found)
    assert least_host_memory(found).bytes == 16 * count + 4 * count
    assert versions_part(found).bytes == 2 * 4 * count
    samples = 10 * 4 * 4 * 16 * 40
    assert disk_part(found).bytes == 4 * 12 * count + 4 * 4 * count + samples
    assert disk_part(run(model, no_save_optim=True)).bytes == 4 * count + 4 * count + samples


def test_a_model_of_unknown_shape_is_counted_in_its_weights(tmp_path: pathlib.Path) -> None:
    assert run_of(None) is None
    config = JobConfig.from_flat({**MINIMAL, "hf_checkpoint": str(tmp_path)}).resolve("cpu")
    assert run_of(settings_of(config)) is None
    header = {"a": {"dtype": "BF16", "shape": [1000, 10], "data_offsets": [0, 0]}, "__metadata__": {"format": "pt"}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    found = run(tmp_path)
    assert total(found) == 10_000
    assert named(trainer_parts(found)[0], "policy optimizer") == 80_000
    assert [part.name for part in engine_parts(found)] == ["engine weights"]


def test_a_report_adds_up_what_shares_a_gpu(model: pathlib.Path) -> None:
    shared = {"rollout_backend": "sglang", "colocate": True, "actor_num_gpus_per_node": 2, "rollout_num_gpus": 2}
    config = JobConfig.from_flat({**MINIMAL, "hf_checkpoint": str(model), **shared}).resolve("cuda")
    cluster = parse_cluster("2x24GiB")
    found = run_of(settings_of(config))
    assert found is not None
    report = report_of(found, cluster, placement_of(config, cluster))
    assert [(load.node, load.gpu, len(load.uses)) for load in report.gpus] == [(0, 0, 2), (0, 1, 2)]
    for load in report.gpus:
        trainer, engine = (sum(part.bytes for part in use.device) for use in load.uses)
        assert load.fits
        assert max(trainer, engine) <= load.peak < trainer + engine  # they take turns


def test_a_layout_that_fits_is_found(tmp_path: pathlib.Path) -> None:
    found = deepseek(tmp_path)
    nodes, layout, flags = fitting_layout(found, 8, H200) or (0, Layout(1), "")
    assert nodes == 16
    assert layout.expert == 128
    assert "--use-distributed-optimizer" in flags
    assert smallest_server(found, H200) == 8  # in FP8, as it is published
    assert smallest_server(deepseek(tmp_path, rollout_weight_format="as_trained"), H200) == 16
    assert fitting_layout(found, 8, 8 * GIB) is None


def test_amounts_are_read_as_people_write_them() -> None:
    assert [size(count) for count in (12, 3 << 20, 5 << 30, 3 << 40)] == ["12 bytes", "3.0 MiB", "5.0 GiB", "3.0 TiB"]
    assert [number(count) for count in (12, 7e3, 3.1e7, 6.71e11)] == ["12", "7k", "31M", "671B"]
    parts = [Part("a", 1, ""), Part("b", 5, "", When.TRAINING), Part("c", 3, "", When.GENERATING)]
    assert peak(parts) == 6


@pytest.mark.parametrize(
    ("rows", "scored", "fused", "measured"),
    [(5312, 4224, True, 6.4), (5312, 4224, False, 7.1), (16384, 15900, False, 18.0)],
)
def test_peaks_that_were_measured_on_a_gpu_are_met_within_a_tenth(
    rows: int, scored: int, fused: bool, measured: float
) -> None:
    """Training steps of benchmarks/results/h200.md, by max_memory_allocated: SmolLM2-135M's shape, bfloat16, one rank.

    `rows` of a micro-batch, of which `scored` predict a response token; prompts are shared. Norms were fused later.
    """
    shape = shape_of({"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152, "num_attention_heads": 9,
                      "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True})  # fmt: skip
    assert shape is not None
    state = model_parameters(shape).total * (4 + 4 + 8 + 2)
    kept = sum(
        layer_elements(shape, layer, Layout(1), sequence_parallel=False, norm_elements=2 if fused else 4)
        for layer in range(shape.layers)
    )
    logits = scored * shape.vocabulary * 2 + 3 * 2**26 * 4
    assert (state + 2 * rows * kept + logits) / 1e9 == pytest.approx(measured, rel=0.1)


def test_fsdp_bounds_logits_of_the_models_whose_head_allows_it(model: pathlib.Path) -> None:
    assert PLAIN_HEADS == scoring_head.PLAIN_HEADS
    long = {"actor_num_gpus_per_node": 1, "rollout_max_context_len": 100_000}
    assert named(activation_parts(run(model, "cuda", **long)), "logits") == scoring_head.MAX_LOGIT_BYTES
    (model / "config.json").write_text(json.dumps(DENSE | {"model_type": "gemma2"}))
    assert named(activation_parts(run(model, "cuda", **long)), "logits") == 100_000 * 50_000 * 2


def test_training_mtp_layers_takes_embeddings_activations_and_logits_on_the_last_stage(tmp_path: pathlib.Path) -> None:
    sizes = {
        "actor_num_gpus_per_node": 8,
        "pipeline_model_parallel_size": 4,
        "decoder_last_pipeline_num_layers": 1,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "mtp_num_layers": 1,
    }
    held, trained = (deepseek(tmp_path, **sizes, enable_mtp_training=on) for on in (False, True))
    borrowed = 129_280 // 2 * 7168 * trained.train_bytes
    for stage in (0, 3):
        parts = megatron_parts(trained, stage)[0]
        assert named(parts, "embeddings for MTP layers") == (borrowed if stage == 3 else 0)
        most = [{part.name: part.bytes for part in activation_parts(each, stage)} for each in (held, trained)]
        assert (most[1]["activations"] > most[0]["activations"]) == (stage == 3)
    assert most[1]["logits"] == 2 * most[0]["logits"]
