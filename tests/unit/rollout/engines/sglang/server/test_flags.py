from __future__ import annotations

import pathlib
from typing import Any

import pytest

from miles.config import JobConfig
from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.options_from_config import configured_options
from miles.services.rollout.engines.sglang.server.flags import (
    command,
    has_draft_weights,
    has_functions,
    is_deterministic,
    lossy_acceptance,
    may_compute_ahead,
    passed_through,
)
from miles.services.rollout.engines.sglang.server.served_model import ServedModel

MINIMAL: dict[str, Any] = {
    "hf_checkpoint": "m",
    "prompt_data": "p.jsonl",
    "label_key": "label",
    "num_rollout": 1,
    "rollout_batch_size": 8,
    "n_samples_per_prompt": 2,
    "lr": 1e-6,
    "rollout_max_response_len": 16,
    "rm_type": "math",
    "rollout_backend": "sglang",
}


def options_of(device: str = "cuda:2", **changes: Any) -> SglangOptions:
    config = JobConfig.from_flat(MINIMAL | changes)
    return SglangOptions(**configured_options(config, device=device, name="rollout-0"))


def test_servers_that_differ_have_their_own_gpus_and_flags(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "servers.yaml"
    path.write_text(
        "sglang:\n- name: actor\n  server_groups:\n  - {worker_type: regular, num_gpus: 2}\n"
        "  - {num_gpus: 4, num_gpus_per_engine: 4, overrides: {mem_fraction_static: 0.7, chunked_prefill_size: 64}}\n"
    )
    options = options_of(sglang_config=str(path), sglang_mem_fraction_static=0.5)
    assert (options.count, list(options.own_gpus)) == (3, [2, 3, 4, 5, 6, 7])
    small, large = words(options, 1), words(options, 2)
    assert "--tp-size 1 --base-gpu-id 3" in small
    assert "--mem-fraction-static=0.5" in small
    assert "--tp-size 4 --base-gpu-id 4" in large
    assert "--mem-fraction-static=0.7 --chunked-prefill-size=64" in large


def words(options: SglangOptions, index: int = 0, max_positions: int = 4096) -> str:
    return " ".join(command(options, index, 30000, ServedModel(options.hf_checkpoint, max_positions)))


def test_parallel_sizes_and_gpus_follow_from_our_own_settings() -> None:
    options = options_of(rollout_num_gpus=4, rollout_num_gpus_per_engine=2, sglang_ep_size=2)
    assert options.count == 2
    assert "--tp-size 2 --base-gpu-id 2" in words(options)
    assert "--tp-size 2 --base-gpu-id 4" in words(options, index=1)
    assert words(options).endswith("--ep-size=2")


def test_engines_are_dealt_to_the_services() -> None:
    assert options_of(rollout_num_gpus=8, rollout_num_workers=4).count == 2
    assert options_of(rollout_num_workers=4).engines == 1


def test_settings_become_flags() -> None:
    line = words(options_of(rollout_dtype="float32", max_running_requests=7, use_rollout_routing_replay=True))
    for flag in ("--dtype float32", "--max-running-requests 7", "--enable-return-routed-experts", "--model-path m"):
        assert flag in line
    assert "--enable-memory-saver" not in line
    assert "--enable-memory-saver" in words(options_of(colocate=True))
    assert "--max-running-requests" not in words(options_of())


def test_a_draft_outlives_the_memory_that_is_released() -> None:
    draft = {"sglang_speculative_algorithm": "EAGLE", "sglang_speculative_draft_model_path": "draft"}
    flag = "--enable-draft-weights-cpu-backup"
    assert flag in words(options_of(colocate=True, **draft))
    assert flag not in words(options_of(colocate=True))
    assert flag not in words(options_of(**draft))
    given = options_of(colocate=True, sglang_enable_draft_weights_cpu_backup=True, **draft)
    assert words(given).count(flag) == 1


def test_the_context_leaves_what_sglang_keeps_to_itself_but_never_exceeds_the_model() -> None:
    options = options_of(rollout_max_context_len=500)
    assert "--context-length 506" in words(options, max_positions=512)
    assert "--context-length" not in words(options, max_positions=504)


def test_a_server_on_the_cpu_sleeps_when_idle_and_needs_no_gpu() -> None:
    line = words(options_of(device="cpu"))
    assert "--device cpu" in line
    assert "--sleep-on-idle" in line
    assert "gpu-id" not in line


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, ["--a-b"]),
        (False, []),
        (None, []),
        (3, ["--a-b=3"]),
        (-1, ["--a-b=-1"]),
        ("x y", ["--a-b=x y"]),
        ([1, 2], ["--a-b", "1", "2"]),
        ({"k": 1}, ['--a-b={"k": 1}']),
    ],
)
def test_flags_of_sglang_are_passed_on(value: Any, expected: list[str]) -> None:
    assert list(passed_through({"a_b": value})) == expected


def test_a_draft_model_of_its_own_is_known() -> None:
    assert has_draft_weights({"speculative_algorithm": "eagle3", "speculative_draft_model_path": "d"})
    assert not has_draft_weights({"speculative_algorithm": "NEXTN"})
    attached = {"model_path": "m", "speculative_draft_model_path": "m"}
    assert not has_draft_weights({**attached, "speculative_algorithm": "EAGLE"}), "its own MTP layers"
    assert has_draft_weights({**attached, "speculative_algorithm": "STANDALONE"})
    assert not has_draft_weights({})
    assert is_deterministic({"enable_deterministic_inference": True})
    assert not is_deterministic({})


def test_a_server_that_accepts_drafts_too_often_is_known_by_its_flags() -> None:
    single, acc = "speculative_accept_threshold_single", "speculative_accept_threshold_acc"
    assert lossy_acceptance({}) == lossy_acceptance({single: 1.0, acc: 1}) == lossy_acceptance({single: None}) == ""
    assert lossy_acceptance({single: 0.5, acc: 1.0}) == f"{single} = 0.5"
    assert lossy_acceptance({single: 0.5, acc: "0.9"}) == f"{single} = 0.5, {acc} = 0.9"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, False),
        ({"attention_backend": "triton", "pp_size": 1, "enable_dp_attention": False}, False),
        ({"speculative_algorithm": "EAGLE"}, True),
        ({"pp_size": 2}, True),
        ({"enable_dp_attention": True}, True),
    ],
)
def test_servers_that_may_compute_after_their_last_result_are_known_by_their_flags(
    flags: dict[str, Any], expected: bool
) -> None:
    assert may_compute_ahead(flags) is expected


def test_a_folder_without_weights_starts_with_noise_and_the_draft_with_its_own() -> None:
    options = options_of(rollout_weight_format="fp8_block", rollout_dtype="bfloat16")
    served = ServedModel("described", 4096, has_weights=False)
    start = " ".join(command(options, 0, 30000, served))
    assert "--model-path described" in start
    assert "--load-format dummy" in start
    assert "--disable-shared-experts-fusion" in start
    assert "draft-load-format" not in start
    assert "--load-format" not in words(options)
    drafted = options_of(sglang_speculative_algorithm="EAGLE3", sglang_speculative_draft_model_path="draft")
    assert "--speculative-draft-load-format auto" in " ".join(command(drafted, 0, 30000, served))
    assert "--disable-shared-experts-fusion" not in words(drafted)


def test_servers_with_drafts_take_as_many_requests_as_they_can_verify_at_once() -> None:
    eagle = {"sglang_speculative_algorithm": "EAGLE", "sglang_speculative_draft_model_path": "d"}
    adaptive = command(options_of(**eagle), 0, 1, ServedModel("m", 4096), {"speculative_adaptive": True})
    assert "--max-running-requests 512" in " ".join(adaptive)
    assert "--max-running-requests 256" in words(options_of(**eagle))
    assert "--max-running-requests 85" in words(options_of(sglang_speculative_algorithm="NGRAM"))
    given = options_of(sglang_speculative_algorithm="NGRAM", sglang_server_concurrency=64)
    assert "--max-running-requests 64" in words(given)
    assert "--max-running-requests 8" in words(options_of(sglang_speculative_algorithm="NGRAM", max_running_requests=8))
    assert "--max-running-requests" not in words(options_of())


def test_flags_of_drafts_that_follow_are_given_to_every_server_and_never_against_the_job() -> None:
    options = options_of(sglang_speculative_algorithm="EAGLE", sglang_speculative_num_steps=5)
    follow = {"speculative_num_steps": 3, "speculative_eagle_topk": 1}
    line = " ".join(command(options, 0, 30000, ServedModel("m", 4096), follow))
    assert "--speculative-num-steps=5" in line
    assert "--speculative-num-steps=3" not in line
    assert "--speculative-eagle-topk=1" in line


def test_servers_of_quantised_weights_have_functions_beside_other_loaders() -> None:
    start = words(options_of(rollout_weight_format="int4", sglang_custom_weight_loader=["a.b"]))
    assert "--custom-weight-loader miles_in_server.keep_workspaces miles_in_server.drain a.b" in start
    assert "--custom-weight-loader" not in words(options_of())
    assert not has_functions({"custom_weight_loader": ["a.b", "miles_in_server.drain"]})
