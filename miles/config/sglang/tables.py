"""SGLang's flags that reach no server as they are: settings of ours, flags without effect, refused and renamed ones.

Keys are SGLang's names with underscores.
"""

from __future__ import annotations

from collections.abc import Mapping

SETTINGS: Mapping[str, str] = {
    "max_running_requests": "max_running_requests",
    "tp_size": "rollout_num_gpus_per_engine",
    "dtype": "rollout_dtype",
    "context_length": "rollout_max_context_len",
}
"""Flags that are a setting here: it is set to their value."""

DTYPES: Mapping[str, str] = {"float": "float32"}
"""SGLang's other names of number types that rollout_dtype has."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "remote_instance_weight_loader_start_seed_via_transfer_engine": (
        "it is dropped, because weights reach servers as rollout_engine_weights says"
    ),
    "remote_instance_weight_loader_ib_device": (
        "it is dropped, because weights reach servers as rollout_engine_weights says"
    ),
}
"""Flags that are taken, change no result, and go no further; with what is done instead."""

_ALONE = "a server is on one host, and the rollout service places it"
_OWN_FORMAT = ("a server would quantise weights by itself, and updates bring others", "set rollout_weight_format")
_NO_SPLIT = "prefill and decoding are not split over servers here"

REFUSED: Mapping[str, tuple[str, str]] = {
    name: ("the rollout service sets this flag itself", remedy)
    for name, remedy in {
        "model_path": "set hf_checkpoint",
        "host": "leave it out",
        "port": "leave it out",
        "device": "set device",
        "base_gpu_id": "leave it out",
        "random_seed": "set rollout_seed",
        "enable_memory_saver": "set offload_rollout",
        "enable_return_routed_experts": "set use_rollout_routing_replay or observe_rollout_routing",
        "incremental_streaming_output": "leave it out",
        "skip_server_warmup": "leave it out",
        "skip_tokenizer_init": "leave it out",
        "weight_version": "leave it out",
        "config": "leave it out",
    }.items()
} | {
    "quantize_and_serve": _OWN_FORMAT,
    "rl_quant_profile": _OWN_FORMAT,
    "modelopt_quant": _OWN_FORMAT,
    "nnodes": (_ALONE, "set rollout_num_gpus to have more servers"),
    "node_rank": (_ALONE, "leave it out"),
    "dist_init_addr": (_ALONE, "leave it out"),
    "api_key": ("requests of the rollout service carry no key", "leave it out: servers listen on 127.0.0.1 alone"),
    "grpc_mode": ("the rollout service speaks HTTP with its servers", "leave it out"),
    "smg_grpc_mode": ("the rollout service speaks HTTP with its servers", "leave it out"),
}
"""Flags that cannot be chosen: the problem and the remedy."""

REFUSED_PREFIXES: Mapping[str, tuple[str, str]] = {
    "disaggregation_": (_NO_SPLIT, "leave it out, and prefill_num_servers too"),
}
"""The same, for all flags that begin so."""

RENAMED: Mapping[str, str] = {
    "nsa_prefill_backend": "dsa_prefill_backend",
    "nsa_decode_backend": "dsa_decode_backend",
    "nsa_topk_backend": "dsa_topk_backend",
    "cuda_graph_max_bs": "cuda_graph_max_bs_decode",
    "cuda_graph_bs": "cuda_graph_bs_decode",
    "disable_piecewise_cuda_graph": "disable_prefill_cuda_graph",
    "mamba_scheduler_strategy": "mamba_radix_cache_strategy",
}
"""Flags of earlier versions of SGLang by the name that they have now."""
