"""Rules about the inference engine and its devices."""

from __future__ import annotations

from collections.abc import Iterator

from miles.addresses import why_not_address
from miles.config.rules.registry import rule
from miles.config.schema.backend_choice import SGLANG_ALONE
from miles.config.schema.catalog import catalog
from miles.config.schema.derivation import needed_staleness
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.engine_spec import engine_spec


@rule
def sglang_has_its_settings_to_itself(s: FlatSettings) -> Iterator[Fault]:
    engine = engine_spec(s.rollout_backend)
    if engine.runs_servers:
        return
    problem = f"rollout_backend = {s.rollout_backend} has no SGLang servers"
    remedy = "set rollout_backend to sglang, or leave it out"
    for name, value in s.sglang_args.items():
        if not name.startswith("speculative_"):  # rules/own_drafts.py
            yield Fault(f"sglang_{name}", value, problem, remedy)
    for key in SGLANG_ALONE:
        value = getattr(s, key)
        if value is not False and s.given(key) and value != catalog()[key].default:
            yield Fault(key, value, problem, remedy)
    if s.offload:
        yield Fault("offload", True, problem, remedy)
    if s.colocate and not s.debug_train_only and not engine.frees_memory and not s.given("offload_rollout"):
        shared = "add --no-offload-rollout --no-offload-train, which has both on the same GPUs at once"
        yield Fault("colocate", True, f"{problem}, and no other engine can free its memory", f"{remedy}, or {shared}")


@rule
def data_parallel_replicas_are_engines(s: FlatSettings) -> Iterator[Fault]:
    copies = s.sglang_args.get("dp_size", 1)
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
def taking_turns_is_synchronous(s: FlatSettings) -> Iterator[Fault]:
    # What is left over from a turn, unfinished or in surplus, may wait for the next one.
    if s.max_weight_staleness <= needed_staleness(s):
        return
    shared = s.colocate and s.offload_rollout is False and s.offload_train is False
    for key in ("colocate", "offload_rollout", "offload_train"):
        if getattr(s, key) and not shared:
            problem = f"max_weight_staleness = {s.max_weight_staleness} has engines and trainer work at once"
            remedy = "leave max_weight_staleness out"
            both = "; --colocate --no-offload-rollout --no-offload-train has both on the same GPUs at once"
            yield Fault(key, True, problem, remedy + both)
            return
