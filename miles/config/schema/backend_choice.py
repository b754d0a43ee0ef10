"""Which settings ask for a trainer or an engine, because no other has them."""

from __future__ import annotations

from miles.config.schema.catalog import catalog
from miles.config.schema.flat_settings import FlatSettings

MEGATRON_SECTIONS = ("megatron", "moe", "numerics")
"""Sections of settings that only Megatron has. One that states what is so anyway is accepted by any trainer."""
MEGATRON_SAYS = ("architecture", "experts", "attention")
"""Sections that only scripts for Megatron have, though any trainer accepts them."""
FSDP_ALONE = ("gradient_checkpointing", "torch_compile", "fsdp_cpu_offload", "attn_implementation")
"""Settings that only fsdp has."""
SGLANG_ALONE = (
    "rollout_num_gpus",
    "rollout_num_gpus_per_engine",
    "sglang_config",
    "rollout_external_engine_addrs",
    "rollout_engine_python",
    "rollout_engine_weights",
    "rollout_engine_weights_dir",
    "rollout_health_check_interval",
    "rollout_health_check_timeout",
    "rollout_health_check_first_wait",
    "sglang_server_concurrency",
    "offload_rollout",
)
"""Settings that only an engine of SGLang's servers has."""
_TORCH_FORMATS = ("mxfp8", "nvfp4")
_NOTHING = {"expert_tensor_parallel_size": 1}
"""Values that ask for nothing, of settings whose default is derived."""


def asks_for_megatron(s: FlatSettings, key: str) -> bool:
    """Return whether a setting of a section of Megatron's has an effect that only Megatron-Core has."""
    entry = catalog()[key]
    if entry.states is not None or entry.ignored is not None:
        return False
    return _asks(s, key)


def asks_of_trainer(s: FlatSettings) -> tuple[str, str] | None:
    """Return the trainer that a setting asks for, and which does; None when any trainer will do."""
    for key, entry in catalog().items():
        if entry.section in MEGATRON_SECTIONS and asks_for_megatron(s, key):
            return "megatron", f"{key} is a setting of Megatron's"
    for key in FSDP_ALONE:
        if _asks(s, key):
            return "fsdp", f"only fsdp has {key}"
    if s.is_valid("low_precision_impl") and s.low_precision_impl == "transformer_engine":
        return "megatron", "only Megatron's layers are TransformerEngine's"
    if _asks(s, "lora_rank"):
        return "fsdp", "fsdp trains adapters of every family"
    for key, entry in catalog().items():
        if entry.section in (*MEGATRON_SAYS, *MEGATRON_SECTIONS) and _asks(s, key):
            return "megatron", f"{key} is a flag of Megatron's"
    return None


def asks_of_engine(s: FlatSettings) -> tuple[str, str] | None:
    """Return the engine that a setting asks for, and which does; None when any engine will do."""
    for key in SGLANG_ALONE:
        if _asks(s, key):
            return "sglang", f"only SGLang's servers have {key}"
    if s.sglang_args:
        return "sglang", f"sglang_{next(iter(s.sglang_args))} is a flag of SGLang's"
    if _asks(s, "colocate") and not (s.is_valid("offload_rollout") and s.given("offload_rollout")):
        return "sglang", "only SGLang's servers free their GPUs, as colocate has them do"
    if s.is_valid("rollout_weight_format") and s.rollout_weight_format in _TORCH_FORMATS:
        return "torch", f"only torch has rollout_weight_format = {s.rollout_weight_format}"
    return None


def _asks(s: FlatSettings, key: str) -> bool:
    """Return whether a setting was given, and not as the value that asks for nothing."""
    if not s.is_valid(key):
        return True
    nothing = _NOTHING.get(key, catalog()[key].default)
    value = getattr(s, key)
    off = value is False and not catalog()[key].negated
    return s.given(key) and not off and value != nothing
