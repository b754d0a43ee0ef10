"""Rules about the inference engine and its devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from miles.addresses import why_not_address
from miles.config.rules.registry import rule
from miles.config.rules.sampling import is_flag
from miles.config.schema.catalog import catalog
from miles.config.schema.derivation import SGLANG_ALONE
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.engine_spec import ENGINE_SPECS, engine_spec

_OURS: Mapping[str, str] = {
    "model_path": "set hf_checkpoint",
    "model": "set hf_checkpoint",
    "host": "leave it out",
    "port": "leave it out",
    "device": "set device",
    "dtype": "set rollout_dtype",
    "tp_size": "set rollout_num_gpus_per_engine",
    "tensor_parallel_size": "set rollout_num_gpus_per_engine",
    "base_gpu_id": "leave it out",
    "random_seed": "set rollout_seed",
    "context_length": "set rollout_max_context_len",
    "max_running_requests": "set max_running_requests",
    "enable_memory_saver": "set offload_rollout",
    "enable_return_routed_experts": "set use_rollout_routing_replay or observe_rollout_routing",
    "incremental_streaming_output": "leave it out",
    "skip_server_warmup": "leave it out",
    "skip_tokenizer_init": "leave it out",
    "weight_version": "leave it out",
}
"""SGLang's flags that follow from other settings, with what to do instead."""


@rule
def sglang_has_its_settings_to_itself(s: FlatSettings) -> Iterator[Fault]:
    engine = engine_spec(s.rollout_backend)
    if engine.runs_servers:
        return
    problem = f"rollout_backend = {s.rollout_backend} has no SGLang servers"
    remedy = "set rollout_backend to sglang, or leave it out"
    for name, value in s.sglang_args.items():
        yield Fault(f"sglang_{name}", value, problem, remedy)
    for key in SGLANG_ALONE:
        value = getattr(s, key)
        if value is not False and s.given(key) and value != catalog()[key].default:
            yield Fault(key, value, problem, remedy)
    if s.colocate and not s.debug_train_only and not engine.frees_memory and not s.given("offload_rollout"):
        shared = "add --no-offload-rollout --no-offload-train, which has both on the same GPUs at once"
        yield Fault("colocate", True, f"{problem}, and no other engine can free its memory", f"{remedy}, or {shared}")


@rule
def sglang_flags_are_said_once(s: FlatSettings) -> Iterator[Fault]:
    for name, value in s.sglang_args.items():
        if (remedy := set_by_the_service(name)) is not None:
            yield Fault(f"sglang_{name}", value, "the rollout service sets this flag itself", remedy)


def set_by_the_service(name: str) -> str | None:
    """Return what to do instead of giving a server this flag; None when it may be given."""
    return next((remedy for flag, remedy in _OURS.items() if is_flag(name, flag)), None)


@rule
def data_parallel_replicas_are_engines(s: FlatSettings) -> Iterator[Fault]:
    copies = s.sglang_args.get("dp_size", s.sglang_args.get("data_parallel_size", 1))
    if str(copies) != "1" and not s.sglang_args.get("enable_dp_attention"):
        problem = "SGLang takes new weights into one copy of the model alone"
        remedy = "set rollout_num_gpus to have more engines, or sglang_enable_dp_attention"
        yield Fault("sglang_dp_size", copies, problem, remedy)


@rule
def engines_divide_over_services(s: FlatSettings) -> Iterator[Fault]:
    gpus, share = s.rollout_num_gpus, s.rollout_num_gpus_per_engine * s.rollout_num_workers
    if gpus is not None and gpus % share:
        problem = f"rollout_num_gpus_per_engine × rollout_num_workers = {share} does not divide it"
        yield Fault("rollout_num_gpus", gpus, problem, f"set it to {max(1, gpus // share) * share}")


@rule
def external_engines_are_addresses(s: FlatSettings) -> Iterator[Fault]:
    addresses = s.rollout_external_engine_addrs
    if addresses is None:
        return
    for address in addresses:
        if (problem := why_not_address(address)) is not None:
            yield Fault("rollout_external_engine_addrs", address, problem, "write it like host:30000")
    if len(addresses) < s.rollout_num_workers:
        problem = f"rollout_num_workers = {s.rollout_num_workers} services need one each"
        yield Fault("rollout_external_engine_addrs", len(addresses), problem, "lower rollout_num_workers")
    if s.given("rollout_num_gpus"):
        problem = "rollout_external_engine_addrs says which engines there are"
        yield Fault("rollout_num_gpus", s.rollout_num_gpus, problem, "leave it out")


@rule
def files_need_the_disk_path(s: FlatSettings) -> Iterator[Fault]:
    if s.rollout_engine_weights_dir is not None and s.rollout_engine_weights != "disk":
        problem = "it does nothing without rollout_engine_weights = disk"
        yield Fault("rollout_engine_weights_dir", s.rollout_engine_weights_dir, problem, "leave it out")


@rule
def servers_take_part_in_broadcasts(s: FlatSettings) -> Iterator[Fault]:
    if not engine_spec(s.rollout_backend).runs_servers or s.rollout_engine_weights != "distributed":
        return
    if s.update_weight_transfer_mode != "broadcast":
        problem = f"update_weight_transfer_mode = {s.update_weight_transfer_mode} brings weights to the rollout service"
        yield Fault("rollout_engine_weights", "distributed", problem, "set update_weight_transfer_mode to broadcast")
    if s.colocate:
        problem = "NCCL connects no two processes on one GPU, as colocate would need"
        yield Fault("rollout_engine_weights", "distributed", problem, "set it to tensor")
    if s.lora_rank:
        problem = f"with lora_rank = {s.lora_rank} the rollout service merges adapters, which such broadcasts go past"
        yield Fault("rollout_engine_weights", "distributed", problem, "set it to tensor")


@rule
def quantised_weights_go_to_an_engine_that_takes_them(s: FlatSettings) -> Iterator[Fault]:
    if s.rollout_weight_format == "as_trained":
        key = "extra_high_precision_layers_hf"
        if s.extra_high_precision_layers_hf:
            problem = "rollout_weight_format = as_trained keeps every weight as it is"
            yield Fault(key, s.extra_high_precision_layers_hf, problem, "set rollout_weight_format, or leave it out")
        return
    if s.rollout_weight_format not in engine_spec(s.rollout_backend).weight_formats:
        problem = f"rollout_backend = {s.rollout_backend} takes weights in rollout_dtype alone"
        able = [name for name, spec in ENGINE_SPECS.items() if s.rollout_weight_format in spec.weight_formats]
        remedy = f"set rollout_backend to {' or '.join(able)}"
        yield Fault("rollout_weight_format", s.rollout_weight_format, problem, remedy)
    if s.lora_rank:
        problem = f"lora_rank = {s.lora_rank} sends adapters, which are merged in rollout_dtype"
        yield Fault("rollout_weight_format", s.rollout_weight_format, problem, "leave one of them out")


@rule
def taking_turns_is_synchronous(s: FlatSettings) -> Iterator[Fault]:
    shared = s.colocate and s.offload_rollout is False and s.offload_train is False
    for key in ("colocate", "offload_rollout", "offload_train"):
        if getattr(s, key) and s.max_weight_staleness and not shared:
            problem = f"max_weight_staleness = {s.max_weight_staleness} has engines and trainer work at once"
            remedy = "set max_weight_staleness to 0, or leave it out"
            both = "; --colocate --no-offload-rollout --no-offload-train has both on the same GPUs at once"
            yield Fault(key, True, problem, remedy + both)
            return
