"""The SGLang engine's options from a job's configuration."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles.config.checks.device import detect_device
from miles.config.server_groups import servers_of_service
from miles.precision.of_run import rollout_recipe
from miles.weights.naming.contract import contract_of

if TYPE_CHECKING:
    from miles.config import JobConfig


def configured_options(
    config: JobConfig, *, device: str, name: str, engine_addresses: Sequence[str] = ()
) -> dict[str, Any]:
    """Keyword arguments of `SglangOptions`; `name` tells this worker from others, the addresses are of its servers."""
    rollout = config.rollout
    weight_dir = rollout.rollout_engine_weights_dir
    return {
        "hf_checkpoint": str(rollout.hf_checkpoint),
        "device": detect_device() if device == "auto" else device,
        "dtype": rollout.rollout_dtype,
        "servers": servers_of_service(config.to_flat()),
        "gpus_per_engine": rollout.rollout_num_gpus_per_engine,
        "addresses": tuple(engine_addresses),
        "python": rollout.rollout_engine_python or sys.executable,
        "server_flags": dict(rollout.sglang_args),
        "max_running_requests": rollout.max_running_requests,
        "max_total_tokens": rollout.rollout_max_context_len,
        "concurrency": rollout.sglang_server_concurrency,
        "routed_experts": rollout.records_routing,
        "memory_saver": config.cluster.offload_rollout,
        "earlier_responses": config.drafts.draft_responses_per_prompt > 0,
        "weight_path": rollout.rollout_engine_weights,
        "weight_dir": None if weight_dir is None else pathlib.Path(weight_dir),
        "contract": contract_of(config),
        "recipe": rollout_recipe(config),
        "bucket_bytes": config.weights.update_weight_buffer_size,
        "random_seed": rollout.rollout_seed,
        "log_dir": pathlib.Path(config.services.run_dir) / "logs",
        "name": name,
        "probe_interval_s": rollout.rollout_health_check_interval,
        "first_probe_s": rollout.rollout_health_check_first_wait,
        "silence_timeout_s": rollout.rollout_health_check_timeout,
    }
