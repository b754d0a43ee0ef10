"""Rules about LoRA training."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import needs, rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.lora_targets import fused_targets
from miles.precision.number_types import decide


@rule
def adapter_settings_need_a_rank(s: FlatSettings) -> Iterator[Fault]:
    for key in ("lora_alpha", "target_modules", "exclude_modules", "lora_adapter_path"):
        yield from needs(s, key, "lora_rank")


@rule
def adapters_drop_nothing(s: FlatSettings) -> Iterator[Fault]:
    if s.lora_dropout:
        problem = "the engine has no dropout, so that the trainer would compute another function than was sampled from"
        yield Fault("lora_dropout", s.lora_dropout, problem, "set it to 0, or leave it out")


_NOT_WITH_MEGATRON = {
    "lora_adapter_path": "its layers have one A for several matrices, which other adapters do not have",
    "mtp_num_layers": "it adapts the decoder alone",
    "use_opd": "it holds no second model beside an adapter's base",
    "pipeline_model_parallel_layout": "a stage might have nothing to train",
}


@rule
def megatron_adapts_matrices_as_it_holds_them(s: FlatSettings) -> Iterator[Fault]:
    if not s.lora_rank or s.train_backend != "megatron":
        return
    for key, problem in _NOT_WITH_MEGATRON.items():
        if value := getattr(s, key):
            remedy = "leave it out, or train with fsdp"
            yield Fault(key, value, f"train_backend = megatron with lora_rank does not take it: {problem}", remedy)
    try:
        fused_targets(s.target_modules, s.exclude_modules)
    except ValueError as error:
        key = "target_modules" if s.exclude_modules is None else "exclude_modules"
        yield Fault(key, getattr(s, key), str(error), "name all of them, or train with fsdp")
    if s.lora_rank % s.tensor_model_parallel_size:
        problem = f"tensor_model_parallel_size = {s.tensor_model_parallel_size} does not divide it"
        yield Fault("lora_rank", s.lora_rank, problem, "choose one that it divides")


@rule
def adapters_are_merged_in_one_type(s: FlatSettings) -> Iterator[Fault]:
    types = decide(s.train_dtype, s.rollout_dtype, {})
    if s.lora_rank and types.train_dtype != types.rollout_dtype:
        problem = f"adapters are merged in the type that both sides compute in, and rollout_dtype = {s.rollout_dtype}"
        source = "" if s.given("train_dtype") else " (train_dtype follows from fp16)"
        yield Fault("train_dtype", s.train_dtype, problem, f"make the two the same{source}")


@rule
def the_reference_of_an_adapter_is_its_base(s: FlatSettings) -> Iterator[Fault]:
    if not s.lora_rank:
        return
    problem = "with lora_rank the reference is the policy without its adapter"
    if s.ref_load not in (None, s.hf_checkpoint):
        yield Fault("ref_load", s.ref_load, problem, "leave it out, or set it to hf_checkpoint")
    if s.ref_update_interval is not None:
        yield Fault("ref_update_interval", s.ref_update_interval, problem, "leave it out")


@rule
def modules_are_named(s: FlatSettings) -> Iterator[Fault]:
    for key in ("target_modules", "exclude_modules"):
        value = getattr(s, key)
        if value is not None and not all(name.strip() for name in value.split(",")):
            yield Fault(key, value, "it has an empty name", "separate names by single commas, like q_proj,v_proj")
