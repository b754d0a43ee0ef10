"""Checks whether SGLang serves a job's model in the format that its weights are published in.

What SGLang 0.5.21 demands is in its sources: sizes in `layers/quantization/fp8.py` (`validate_block_quant_shapes`) and
`marlin_utils.py` (`check_moe_marlin_supports_layer`), what updates need in `weight_updater.py`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.config.schema.faults import ConfigError, Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.server_groups import READ, Server, servers_of_service
from miles.config.sglang.taking import take
from miles.engine_spec import engine_spec
from miles.memory.model import ModelShape, shape_of
from miles.precision.of_run import recipes_of
from miles.precision.recipe import FP8_BLOCK, Recipe

_HIDDEN_MULTIPLE, _WIDTH_MULTIPLE = 128, 64
"""Of the sizes of Marlin's expert kernels."""
_GROUP_SIZES = (32, 64, 128)
_SAYS_FORMAT = ("quantization", "load_format", "json_model_override_args")
"""Flags of SGLang's that say otherwise what a server's weights are."""
_REPACKS = ("auto", "marlin")
"""Runners of INT4 experts that SGLang restores before an update."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """Matrices of a decoder layer that SGLang holds as one, as one GPU has them."""

    names: tuple[str, ...]
    """Within the layer."""
    outputs: tuple[int, ...]
    """Of each; empty where any size will do."""
    inputs: int
    routed: bool = False


def served_precision_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield a fault for each reason why SGLang cannot serve or update the weights; nothing for other engines.

    Nothing either for sizes of a model that cannot be read, and of servers that run already.
    """
    if s.rollout_backend != "sglang" or s.debug_train_only or not s.hf_checkpoint:
        return
    model = read_json_object(pathlib.Path(s.hf_checkpoint) / "config.json")
    recipes = recipes_of(s, model)
    recipe = None if recipes is None else recipes.served  # another check reports a file with a fault
    if recipe is None or recipe.format not in engine_spec("sglang").weight_formats:
        return  # a rule reports formats that it does not take
    yield from _run_faults(s, recipe)
    try:
        servers = servers_of_service({key: getattr(s, key) for key in READ})
    except ConfigError:
        return  # another check reports it
    if s.rollout_external_engine_addrs is not None:
        servers = (Server(1, {}),)
    groups = {server.group: server for server in servers or (Server(1, {}),)}
    found = [fault for server in groups.values() for fault in _flag_faults(recipe, s, server)]
    yield from {str(fault): fault for fault in found}.values()
    shape = shape_of(model)
    if shape is None:
        return
    for problem, remedy in dict.fromkeys(_model_problems(s, recipe, shape, servers)):
        yield _fault(s, problem, remedy)


def _run_faults(s: FlatSettings, recipe: Recipe) -> Iterator[Fault]:
    name = recipe.format
    if s.device == "cpu" and s.rollout_external_engine_addrs is None:
        remedy = "set rollout_backend to torch, or rollout_weight_format to as_trained"
        yield _fault(s, f"SGLang serves {name} on GPUs alone, and device = cpu", remedy)
    if s.rollout_dtype == "float32":
        problem = f"SGLang multiplies {name} matrices with inputs of 16 bits"
        yield Fault("rollout_dtype", s.rollout_dtype, problem, "set it to bfloat16")


def _flag_faults(recipe: Recipe, s: FlatSettings, server: Server) -> Iterator[Fault]:
    """Flags of a server that do not go with the recipe: those of all servers, or of its group in `sglang_config`."""
    name, as_trained = recipe.format, "set rollout_weight_format to as_trained"
    own = take(server.flags, {}, "sglang_").args
    flags = {**s.sglang_args, **own}

    def fault(flag: str, value: Any, problem: str, remedy: str) -> Fault:
        if flag not in own:
            return Fault(f"sglang_{flag}", value, problem, remedy)
        where = f"{flag} of {server.group} is {_text(value)}, and"
        return Fault("sglang_config", s.sglang_config, f"{where} {problem}", remedy)

    for flag in _SAYS_FORMAT:
        value = flags.get(flag)
        if value is not None and (flag != "json_model_override_args" or "quantization_config" in _text(value)):
            problem = f"rollout_weight_format = {s.rollout_weight_format} has servers take weights in {name}"
            yield fault(flag, value, problem, f"leave it out, or {as_trained}")
    algorithm = str(flags.get("speculative_algorithm") or "").upper()
    if algorithm in engine_spec("sglang").mtp_drafts and flags.get("speculative_draft_model_path") is None:
        problem = f"drafts of the policy's own MTP layers are not served beside {name} weights: SGLang names a draft's "
        problem += "modules by itself, so exceptions by the model's names do not reach them"
        yield fault(
            *("speculative_algorithm", algorithm, problem),
            f"give sglang_speculative_draft_model_path, or {as_trained}",
        )
    runner = str(flags.get("moe_runner_backend") or "auto")
    if name == "int4" and runner not in _REPACKS:
        problem = "SGLang cannot update INT4 weights that this runner has repacked"
        yield fault("moe_runner_backend", runner, problem, f"set it to {' or '.join(_REPACKS)}")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _fault(s: FlatSettings, problem: str, remedy: str) -> Fault:
    return Fault("rollout_weight_format", s.rollout_weight_format, problem, remedy)


Problem = tuple[str, str]


def _model_problems(
    s: FlatSettings, recipe: Recipe, shape: ModelShape, servers: tuple[Server, ...]
) -> Iterator[Problem]:
    if recipe.format == "int4":
        if not shape.experts:
            yield (
                "SGLang can update INT4 weights of routed experts alone, and the model has none",
                "set it to fp8_block",
            )
            return
        if recipe.group_size not in _GROUP_SIZES:
            sizes = ", ".join(map(str, _GROUP_SIZES))
            yield f"SGLang's INT4 kernels take groups of {sizes}, not of {recipe.group_size}", "set int4_group_size"
    for server in servers:
        flags = {**s.sglang_args, **server.flags}
        for layer in range(shape.layers):
            for module in modules(shape, layer, server.gpus, flags):
                yield from _module_problems(recipe, layer, module, server.gpus)


def _module_problems(recipe: Recipe, layer: int, module: Module, gpus: int) -> Iterator[Problem]:
    covered = [recipe.layers.cover(f"model.layers.{layer}.{name}.weight", 2) for name in module.names]
    if not any(covered):
        return
    name, narrower = module.names[0], "set rollout_num_gpus_per_engine or sglang_ep_size to have larger parts"
    if not all(covered):
        apart = next(other for other, is_covered in zip(module.names, covered, strict=True) if is_covered != covered[0])
        problem = f"SGLang holds {name} and {apart} as one, and one of them is in {recipe.format} alone"
        yield problem, "set extra_high_precision_layers_hf to keep both out, or none"
    elif recipe.format == "fp8_block":
        for size in (module.inputs, *module.outputs):
            if size % FP8_BLOCK:
                where = f"{name} is {size} wide on one of {gpus} GPUs" if gpus > 1 else f"{name} is {size} wide"
                yield f"{where}, no multiple of the blocks of {FP8_BLOCK}", f"{narrower}, or as_trained"
    elif not module.routed:
        problem = f"SGLang cannot update the INT4 weights of {name}, which are repacked for good when it starts"
        yield problem, "set int4_layers to .experts."
    else:
        hidden, multiple = module.inputs, max(_WIDTH_MULTIPLE, recipe.group_size)
        if hidden % max(_HIDDEN_MULTIPLE, recipe.group_size):
            yield f"SGLang's INT4 kernels need a hidden size in multiples of {_HIDDEN_MULTIPLE}", "set it to as_trained"
        if (width := module.outputs[0]) % multiple:
            problem = f"experts are {width} wide on one of {gpus} GPUs, no multiple of {multiple}"
            yield problem, f"{narrower}, or a smaller int4_group_size"


def modules(shape: ModelShape, layer: int, gpus: int, flags: Mapping[str, Any]) -> Iterator[Module]:
    """The modules of a decoder layer in a server of this many GPUs, with these flags of SGLang's."""
    copies = int(flags.get("dp_size") or 1) if flags.get("enable_dp_attention") else 1
    yield from _attention(shape, max(1, gpus // copies))
    if layer not in shape.expert_layers:
        yield from _mlp("mlp", shape.hidden, shape.width // gpus)
        return
    width = shape.expert_width // max(1, gpus // int(flags.get("ep_size") or 1))
    names = tuple(f"mlp.experts.0.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    yield Module(names=names, outputs=(width,), inputs=shape.hidden, routed=True)
    if shape.shared_width:
        shared = "shared_expert" if shape.shared_gate else "shared_experts"
        yield from _mlp(f"mlp.{shared}", shape.hidden, shape.shared_width // gpus)


def _attention(shape: ModelShape, gpus: int) -> Iterator[Module]:
    heads, hidden = shape.heads // gpus, shape.hidden
    if shape.latent is None:
        queries, groups = heads * shape.head_dim, max(1, shape.key_value_heads // gpus) * shape.head_dim
        names = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
        yield Module(names=names, outputs=(queries, groups), inputs=hidden)
        yield Module(names=("self_attn.o_proj",), outputs=(), inputs=queries)
        return
    latent, query = shape.latent, "q_proj"
    split = gpus > 1  # the outputs of a matrix that is neither split nor fused may have any size
    if latent.query_rank is not None:
        names, query = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "q_b_proj"
        yield Module(names=names, outputs=(), inputs=hidden)
    wide, back = heads * (latent.nope_dim + latent.rope_dim), heads * (latent.nope_dim + latent.value_dim)
    yield Module(
        names=(f"self_attn.{query}",), outputs=(wide,) if split else (), inputs=latent.query_rank or shape.hidden
    )
    yield Module(names=("self_attn.kv_b_proj",), outputs=(back,) if split else (), inputs=latent.key_value_rank)
    yield Module(names=("self_attn.o_proj",), outputs=(), inputs=heads * latent.value_dim)


def _mlp(name: str, hidden: int, width: int) -> Iterator[Module]:
    yield Module(names=(f"{name}.gate_proj", f"{name}.up_proj"), outputs=(width,), inputs=hidden)
    yield Module(names=(f"{name}.down_proj",), outputs=(), inputs=width)
