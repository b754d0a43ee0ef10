"""What happens when a setting differs between a checkpoint and the run that loads it: the table, and comparisons by it.

Every section has a rule for all of its settings, and some settings have one of their own.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from miles.config.schema.catalog import catalog


class Effect(enum.Enum):
    """What a changed setting does to a run that goes on from a checkpoint."""

    REFUSED = "is refused"
    """The checkpoint holds nothing that fits the new value."""
    NEW_DATA = "starts the data set from its first row, and says so, if the prompts or their order differ"
    APPLIED = "takes the new value, and says so"
    FREE = "takes the new value; what is computed does not depend on it"


_BY_SECTION: Mapping[str, Effect] = {
    "services": Effect.FREE,
    "cluster": Effect.FREE,
    "data": Effect.APPLIED,
    "rollout": Effect.APPLIED,
    "reward": Effect.APPLIED,
    "extensions": Effect.APPLIED,
    "eval": Effect.APPLIED,
    "algorithm": Effect.APPLIED,
    "policy_loss": Effect.APPLIED,
    "distillation": Effect.APPLIED,
    "train": Effect.APPLIED,
    "lora": Effect.REFUSED,
    "megatron": Effect.FREE,
    "numerics": Effect.FREE,
    "architecture": Effect.FREE,
    "experts": Effect.FREE,
    "attention": Effect.FREE,
    "moe": Effect.FREE,
    "optimizer": Effect.APPLIED,
    "weights": Effect.FREE,
    "precision": Effect.APPLIED,
    "drafts": Effect.FREE,
    "checkpoint": Effect.FREE,
    "telemetry": Effect.FREE,
    "debug": Effect.FREE,
    "fault_tolerance": Effect.FREE,
    "gateway": Effect.FREE,
    "tls": Effect.FREE,
}
_BY_SETTING: Mapping[str, Effect] = {
    # What the tensors of a checkpoint are.
    "train_backend": Effect.REFUSED,
    "mtp_num_layers": Effect.REFUSED,
    "moe_router_freeze_gate": Effect.REFUSED,
    # The order of groups.
    "prompt_data": Effect.NEW_DATA,
    "input_key": Effect.NEW_DATA,
    "rollout_seed": Effect.NEW_DATA,
    "rollout_shuffle": Effect.NEW_DATA,
    # Models that a run is measured or trained against.
    "ref_load": Effect.APPLIED,
    "critic_load": Effect.APPLIED,
    # Losses and other parts of the computation, in sections about layouts.
    "moe_aux_loss_coeff": Effect.APPLIED,
    "moe_z_loss_coeff": Effect.APPLIED,
    "moe_router_load_balancing_type": Effect.APPLIED,
    "moe_router_bias_update_rate": Effect.APPLIED,
    "moe_router_dtype": Effect.APPLIED,
    "enable_mtp_training": Effect.APPLIED,
    "mtp_loss_scaling_factor": Effect.APPLIED,
    # What is trained on, in a section about inspection.
    "load_debug_rollout_data": Effect.APPLIED,
    "load_debug_rollout_data_subsample": Effect.APPLIED,
    # Where and how, in sections about more than that; environments and addresses may hold secrets.
    "lora_adapter_path": Effect.FREE,
    "train_env_vars": Effect.FREE,
    "micro_batch_size": Effect.FREE,
    "use_dynamic_batch_size": Effect.FREE,
    "max_tokens_per_gpu": Effect.FREE,
    "log_probs_max_tokens_per_gpu": Effect.FREE,
    "log_probs_chunk_size": Effect.FREE,
    "deterministic_mode": Effect.FREE,
    "gradient_checkpointing": Effect.FREE,
    "torch_compile": Effect.FREE,
    "fsdp_cpu_offload": Effect.FREE,
    "share_prompts": Effect.FREE,
    "reward_service": Effect.FREE,
    "opd_teacher_urls": Effect.FREE,
    "opd_teacher_key_file": Effect.FREE,
    "opd_teacher_timeout_s": Effect.FREE,
    "rm_url": Effect.FREE,
    "rollout_num_gpus": Effect.FREE,
    "rollout_num_gpus_per_engine": Effect.FREE,
    "sglang_config": Effect.FREE,
    "rollout_external_engine_addrs": Effect.FREE,
    "rollout_engine_python": Effect.FREE,
    "rollout_engine_weights": Effect.FREE,
    "rollout_engine_weights_dir": Effect.FREE,
    "rollout_health_check_interval": Effect.FREE,
    "rollout_health_check_timeout": Effect.FREE,
    "rollout_health_check_first_wait": Effect.FREE,
    "sglang_server_concurrency": Effect.FREE,
    "max_running_requests": Effect.FREE,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One setting that differs."""

    key: str
    was: Any
    now: Any

    @property
    def effect(self) -> Effect:
        """What it does to a run that goes on."""
        return effect_of(self.key)

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.was)} → {_shown(self.now)}"


def effect_of(key: str) -> Effect:
    """Return the rule for a setting; names of an engine's own flags are free."""
    entry = catalog().get(key)
    return Effect.FREE if entry is None else _BY_SETTING.get(key, _BY_SECTION[entry.section])


def recorded(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a flat configuration that a checkpoint records: all that are not free."""
    return {key: value for key, value in flat.items() if effect_of(key) is not Effect.FREE}


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """List the recorded settings that differ between two flat configurations in JSON types, in the catalog's order.

    A setting that one of them lacks, because it is newer, does not count.
    """
    return [
        Change(key, was[key], now[key])
        for key in catalog()
        if key in was and key in now and was[key] != now[key] and effect_of(key) is not Effect.FREE
    ]


def rules_table() -> str:
    """Return the table as Markdown, for docs/data.md."""
    rows = ["| changed | a run that goes on |", "|---|---|"]
    for effect in Effect:
        sections = [name for name, each in _BY_SECTION.items() if each is effect]
        others = [f"`{key}`" for key, each in _BY_SETTING.items() if each is effect]
        whole = [f"every other setting of {', '.join(sections)}"] if sections else []
        rows.append(f"| {'; '.join([', '.join(others), *whole] if others else whole)} | {effect.value} |")
    return "\n".join(rows)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
