"""Rules about low precision: which formats trainer and engines have together, by settings alone.

`checks.precision` has those that need config.json of the model, or the machine.
"""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import needs, rule
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.schema.precision_variables import contradicted
from miles.engine_spec import ENGINE_SPECS, engine_spec
from miles.precision.number_types import AUTO, decide
from miles.precision.of_run import module_patterns, training_format
from miles.precision.te_config import BASE64, PrecisionFileError

EXCEPTIONS = (
    "first_last_layers_bf16",
    "extra_high_precision_layers_hf",
    "extra_high_precision_layers_megatron",
    "te_precision_config_file",
)
"""Settings that keep weights out of formats."""
SWITCHES = ("fp8_format", "fp4_format", "int4_qat")
"""Settings that give the trainer a format."""
_INSTEAD = {"fp8": "fp8_block", "w8a8_fp8": "fp8_block", "mxfp8": "mxfp8", "compressed-tensors": "int4"}
"""Formats here that are SGLang's quantisation methods."""
_WITHOUT_FORMAT = "it does nothing without a format: fp8_format, fp4_format, int4_qat or rollout_weight_format"


@rule
def fp8_has_scales_that_engines_have(s: FlatSettings) -> Iterator[Fault]:
    if s.fp8_format is not None and s.fp8_recipe is None:
        problem = (
            f"fp8_format = {s.fp8_format} needs it: Megatron's default, delayed, has scales of earlier steps, which no "
            "engine has"
        )
        yield Fault("fp8_recipe", None, problem, "set it to blockwise")
    for key, switch in (("fp8_recipe", "fp8_format"), ("fp4_recipe", "fp4_format")):
        yield from needs(s, key, switch)


@rule
def variables_say_what_settings_say(s: FlatSettings) -> Iterator[Fault]:
    for asked in contradicted(s, s.train_env_vars):
        name, problem = asked.variable.partition(" ")[0], f"{asked.variable} in train_env_vars says otherwise"
        yield Fault(asked.key, getattr(s, asked.key), problem, f"leave {name} out")


@rule
def a_trainer_has_one_format(s: FlatSettings) -> Iterator[Fault]:
    switches = [key for key in SWITCHES if getattr(s, key)]
    for key in switches[1:]:
        problem = f"{switches[0]} = {_shown(s, switches[0])} gives the trainer another format"
        yield Fault(key, getattr(s, key), problem, "leave one of them out")


@rule
def engines_have_the_trainers_format_or_none(s: FlatSettings) -> Iterator[Fault]:
    trained, asked = training_format(s), s.rollout_weight_format
    if trained is None or asked in (AUTO, trained):
        return
    key = switch(s)
    if asked != "as_trained":
        problem = f"{key} = {_shown(s, key)} has the trainer compute in {trained}, which is another function"
        yield Fault("rollout_weight_format", asked, problem, "leave it out: engines get the trainer's format")
    elif trained == "int4":
        problem = "int4_qat = true trains weights that are rounded, and engines would sample from others"
        yield Fault("rollout_weight_format", asked, problem, "leave it out: engines get INT4")


@rule
def engines_take_the_format(s: FlatSettings) -> Iterator[Fault]:
    wanted = rollout_format(s)
    if wanted in (None, "as_trained"):
        return
    key, value = _source(s)
    if s.lora_rank:
        problem = f"lora_rank = {s.lora_rank} sends adapters, which are merged in rollout_dtype"
        yield Fault(key, value, problem, "leave one of them out")
    elif s.debug_train_only:
        return
    elif wanted not in engine_spec(s.rollout_backend).weight_formats:
        able = [name for name, spec in ENGINE_SPECS.items() if wanted in spec.weight_formats]
        problem = f"rollout_backend = {s.rollout_backend} does not take {'it' if value == wanted else wanted}"
        remedy = f"set rollout_backend to {' or '.join(able)}"
        if value != wanted:
            remedy += ", or rollout_weight_format to as_trained"
        yield Fault(key, value, problem, remedy)


@rule
def the_trainer_computes_in_a_type_of_the_format(s: FlatSettings) -> Iterator[Fault]:
    if (trained := training_format(s)) is None:
        return
    key = switch(s)
    if s.train_dtype == "float16":
        problem = f"scales of {trained} need the range of bfloat16, and train_dtype = float16"
        yield Fault(key, getattr(s, key), problem, "set train_dtype to bfloat16")
    elif AUTO not in (s.train_dtype, s.rollout_dtype) and s.train_dtype != s.rollout_dtype:
        problem = (
            f"{key} = {_shown(s, key)} rounds the weights of trainer and engines alike in one type, and train_dtype"
        )
        yield Fault("rollout_dtype", s.rollout_dtype, f"{problem} = {s.train_dtype}", "make the two the same")


@rule
def kernels_have_the_format(s: FlatSettings) -> Iterator[Fault]:
    trained, asked = training_format(s), s.low_precision_impl
    if trained is None:
        if asked != AUTO:
            problem = "it does nothing without a format of the trainer: fp8_format, fp4_format or int4_qat"
            yield Fault("low_precision_impl", asked, problem, "set one of them, or leave it out")
        return
    why = why_emulated(s)
    if asked == "transformer_engine" and why is not None:
        yield Fault("low_precision_impl", asked, why, "set it to emulated, or leave it out")
    if s.fp8_format == "hybrid" and (why or asked == "emulated"):
        why = why or "low_precision_impl = emulated"
        problem = f"its e5m2 is of gradients, which emulation computes in train_dtype, and {why}"
        yield Fault("fp8_format", "hybrid", problem, "set it to e4m3")


def why_emulated(s: FlatSettings) -> str | None:
    """Why TransformerEngine does not compute in the trainer's format; None when it may. Needs a format."""
    trained = training_format(s)
    if trained in ("int4", "nvfp4"):
        return f"TransformerEngine does not round to {trained} as engines do"
    if s.train_backend != "megatron":
        return f"train_backend = {s.train_backend} has no layers of TransformerEngine"
    if s.device == "cpu":
        return "TransformerEngine computes on GPUs alone, and device is cpu"
    if s.transformer_impl == "local":
        return "transformer_impl = local has layers without TransformerEngine"
    if decide(s.train_dtype, s.rollout_dtype, {}).train_dtype != "bfloat16":
        return "TransformerEngine's kernels go with train_dtype = bfloat16"
    return None


@rule
def compiled_layers_have_no_format(s: FlatSettings) -> Iterator[Fault]:
    if s.torch_compile and s.train_backend == "fsdp" and training_format(s) is not None:
        key = switch(s)
        why = f"compiled graphs have not been seen to round as engines do, and {key} = {_shown(s, key)}"
        yield Fault("torch_compile", True, why, "leave one of them out")


@rule
def adapters_have_no_format(s: FlatSettings) -> Iterator[Fault]:
    if s.lora_rank and (trained := training_format(s)) is not None and s.rollout_weight_format == "as_trained":
        key = switch(s)
        problem = f"{trained} is of the sum of base and adapter, which lora_rank = {s.lora_rank} keeps apart"
        yield Fault(key, getattr(s, key), problem, "leave one of them out")


@rule
def settings_of_formats_have_one(s: FlatSettings) -> Iterator[Fault]:
    for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        yield from needs(s, key, "first_last_layers_bf16")
    if s.rollout_weight_format == AUTO:
        return  # config.json may have a format: `checks.precision` looks
    yield from without_format(s, {format for format in (training_format(s), s.rollout_weight_format) if format})


def without_format(s: FlatSettings, formats: set[str]) -> Iterator[Fault]:
    """Yield a fault for each setting of a format that neither trainer nor engines have."""
    if formats <= {"as_trained"}:
        for key in (*EXCEPTIONS, "precision_metrics_interval"):
            if (value := getattr(s, key)) not in (None, False, (), 0):
                yield Fault(key, _plain(value), _WITHOUT_FORMAT, "set one of them, or leave it out")
    of = {"int4_group_size": "int4", "int4_layers": "int4", "fp8_block_scales": "fp8_block"}
    ways = {"int4": "int4_qat or rollout_weight_format = int4", "fp8_block": "fp8_format or rollout_weight_format"}
    for key, wanted in of.items():
        if getattr(s, key) != catalog()[key].default and wanted not in formats:
            problem = f"neither trainer nor engines compute in {wanted}"
            yield Fault(key, _plain(getattr(s, key)), problem, f"set {ways[wanted]}, or leave it out")


@rule
def a_file_of_precision_has_one_format(s: FlatSettings) -> Iterator[Fault]:
    value = s.te_precision_config_file
    if value is None or not value.startswith(BASE64):
        return  # `checks.precision` reads files
    yield from precision_file_faults(s)


def precision_file_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield what is wrong with te_precision_config_file."""
    try:
        module_patterns(s)
    except PrecisionFileError as error:
        remedy = "name what to keep in extra_high_precision_layers_hf, and leave it out"
        yield Fault("te_precision_config_file", s.te_precision_config_file, str(error), remedy)


@rule
def servers_do_not_quantise(s: FlatSettings) -> Iterator[Fault]:
    if s.rollout_weight_format == "as_trained":
        yield from server_format_faults(s)


def server_format_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield a fault when SGLang is told to quantise weights that are published in rollout_dtype."""
    if (method := s.sglang_args.get("quantization")) in (None, "unquant"):
        return
    problem = "weights are published in rollout_dtype, and a server that quantises them by itself takes no updates"
    instead = _INSTEAD.get(str(method))
    remedy = "leave it out" if instead is None else f"set rollout_weight_format to {instead}"
    yield Fault("sglang_quantization", method, problem, remedy)


def rollout_format(s: FlatSettings) -> str | None:
    """What engines hold weights in, as far as settings say; None when config.json of the model decides."""
    if s.rollout_weight_format != AUTO:
        return str(s.rollout_weight_format)
    return training_format(s)


def switch(s: FlatSettings) -> str:
    """The setting that gives the trainer its format."""
    return next(key for key in SWITCHES if getattr(s, key))


def _source(s: FlatSettings) -> tuple[str, object]:
    """The setting that gives engines their format, and its value."""
    if s.rollout_weight_format != AUTO:
        return "rollout_weight_format", s.rollout_weight_format
    return switch(s), getattr(s, switch(s))


def _shown(s: FlatSettings, key: str) -> str:
    value = getattr(s, key)
    return "true" if value is True else str(value)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
