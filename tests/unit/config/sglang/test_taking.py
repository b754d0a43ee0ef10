from __future__ import annotations

from typing import Any

import pytest
from config_cases import MINIMAL, faults_for

from miles.config import JobConfig
from miles.config.command.flags import parse_command_line
from miles.config.job import examine

SGLANG = {"rollout_backend": "sglang"}


def accepted(**changes: Any) -> JobConfig:
    return JobConfig.from_flat(MINIMAL | changes)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"sglang_mem_fraction_statik": 0.7},
            "sglang_mem_fraction_statik = 0.7, but SGLang has no such flag; did you mean sglang_mem_fraction_static?",
        ),
        (
            {"sglang_zzz": 1},
            "sglang_zzz = 1, but SGLang has no such flag; `python -m sglang.launch_server --help` lists its flags",
        ),
        (
            {"sglang_attention_backend": "flashinfr"},
            "did you mean flashinfer?",
        ),
        ({"sglang_enable_metrics": "yes"}, "sglang_enable_metrics = yes, but it is a switch; write --sglang-enable"),
        ({"sglang_page_size": True}, "sglang_page_size = true, but it takes a value; write --sglang-page-size VALUE"),
        ({"sglang_page_size": "big"}, "sglang_page_size = big, but it must be a whole number; correct it"),
        ({"sglang_mem_fraction_static": "x"}, "sglang_mem_fraction_static = x, but it must be a number; correct it"),
        ({"sglang_page_size": ["1", "2"]}, "sglang_page_size = 1 2, but it takes one value; quote it, or give one"),
        ({"sglang_cuda_graph_bs": [1, "x"]}, "sglang_cuda_graph_bs = x, but it must be a whole number; correct it"),
        (
            {"sglang_ep_size": 2, "sglang_expert_parallel_size": 4},
            "sglang_expert_parallel_size = 4, but sglang_ep_size = 2 is the same flag of SGLang; leave one of them out",
        ),
        (
            {"sglang_tp": 4, "rollout_num_gpus_per_engine": 2},
            "sglang_tp = 4, but rollout_num_gpus_per_engine = 2 is the setting for it; leave one of them out, or give",
        ),
        (
            {"sglang_context_length": 10, "rollout_max_context_len": 32},
            "sglang_context_length = 10, but rollout_max_context_len = 32 is the setting for it",
        ),
        ({"sglang_dtype": "half"}, "rollout_dtype = half, but it must be one of auto, bfloat16, float32"),
        ({"sglang_enable_memory_saver": True}, "the rollout service sets this flag itself; set offload_rollout"),
        ({"sglang_nnodes": 2}, "sglang_nnodes = 2, but a server is on one host"),
        ({"sglang_disaggregation_mode": "prefill"}, "but prefill and decoding are not split over servers here"),
        ({"sglang_router_ip": "10.0.0.1"}, "but requests go to servers straight, and not through a router"),
    ],
)
def test_what_sglang_would_refuse_or_we_set_is_a_fault(changes: dict[str, Any], fault: str) -> None:
    (found,) = faults_for(**SGLANG, **changes)
    assert fault in found


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"sglang_max_running_requests": "512"}, "max_running_requests", 512),
        ({"sglang_max_running_requests": "512", "max_running_requests": 512}, "max_running_requests", 512),
        ({"sglang_tp_size": "4"}, "rollout_num_gpus_per_engine", 4),
        ({"sglang_tensor_parallel_size": 4}, "rollout_num_gpus_per_engine", 4),
        ({"sglang_tp": 4}, "rollout_num_gpus_per_engine", 4),
        ({"sglang_dtype": "bfloat16"}, "rollout_dtype", "bfloat16"),
        ({"sglang_dtype": "float"}, "rollout_dtype", "float32"),
        ({"sglang_context_length": 64}, "rollout_max_context_len", 64),
        ({"sglang_context_length": 64, "rollout_max_context_len": 48}, "rollout_max_context_len", 48),
    ],
)
def test_a_flag_that_is_a_setting_here_is_taken_as_it_and_asks_for_sglang(
    changes: dict[str, Any], key: str, value: object
) -> None:
    rollout = accepted(**changes).rollout
    assert (getattr(rollout, key), rollout.rollout_backend, rollout.sglang_args) == (value, "sglang", {})


def test_what_follows_from_flags_is_the_same_when_a_configuration_is_read_again() -> None:
    config = accepted(sglang_tp_size=2, sglang_nsa_decode_backend="fa3", sglang_expert_parallel_size="2")
    assert config.rollout.sglang_args == {"dsa_decode_backend": "fa3", "ep_size": "2"}
    assert JobConfig.from_flat(config.to_flat()) == config


def test_renamed_flags_and_those_without_effect_are_noted() -> None:
    words = (
        "--sglang-cuda-graph-bs 1 2 4 --sglang-router-policy consistent_hashing --sglang-disable-piecewise-cuda-graph"
    )
    examination = examine(MINIMAL | parse_command_line(words.split()).flat)
    assert examination.faults == []
    assert examination.settings.sglang_args == {
        "cuda_graph_bs_decode": ["1", "2", "4"],
        "disable_prefill_cuda_graph": True,
    }
    assert [str(note) for note in examination.notes] == [
        "sglang_router_policy = consistent_hashing: it changes nothing: there is no router: the rollout service sends "
        "requests to its servers itself",
        'sglang_cuda_graph_bs = ["1", "2", "4"]: it is sglang_cuda_graph_bs_decode in this version of SGLang',
        "sglang_disable_piecewise_cuda_graph = true: it is sglang_disable_prefill_cuda_graph in this version of SGLang",
    ]


def test_an_engine_without_servers_refuses_the_flags_as_they_were_written() -> None:
    (fault,) = faults_for(rollout_backend="torch", sglang_tp=2)
    assert fault.startswith("sglang_tp = 2, but rollout_backend = torch has no SGLang servers")
