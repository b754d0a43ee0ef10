"""Derives settings that are not given from others."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable

from miles.config.schema.catalog import SECTIONS, catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings, InvalidSetting
from miles.engine_spec import engine_spec
from miles.precision.number_types import AUTO

FALLBACKS = {
    "eval_temperature": "rollout_temperature",
    "eval_top_p": "rollout_top_p",
    "eval_top_k": "rollout_top_k",
    "eval_max_response_len": "rollout_max_response_len",
    "eval_max_prompt_len": "rollout_max_prompt_len",
    "eval_input_key": "input_key",
    "eval_label_key": "label_key",
    "eval_reward_key": "reward_key",
    "eps_clip_high": "eps_clip",
    "log_probs_max_tokens_per_gpu": "max_tokens_per_gpu",
}
"""Settings that default to another setting."""

COMPARES_SAMPLES = ("grpo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")
"""Advantage estimators that compare the responses to a prompt."""
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

_PROMPTS, _RESPONSES, _RESPONSE_TOKENS = 32, 8, 8192
"""What public recipes of GRPO have most often."""
_SEARCHED = 10_000
"""How far from a number that does not divide another one to search for one that does."""


def derive(settings: FlatSettings) -> list[Fault]:
    """Fill in every derived setting; return the faults that prevent it."""
    faults: list[Fault] = []
    for step in _STEPS:
        try:
            faults += step(settings)
        except InvalidSetting:
            continue
    # A setting that could not be derived, because its sources are invalid, is invalid too.
    settings.refuse(*(key for key in _always_filled() if settings.is_empty(key)))
    return faults


@functools.cache
def _always_filled() -> frozenset[str]:
    """Return the settings without a default, which some step must fill in."""
    return frozenset(
        key
        for section in SECTIONS.values()
        for key, field in section.model_fields.items()
        if field.default is None and type(None) not in typing.get_args(field.annotation)
    )


def _batch_sizes(s: FlatSettings) -> list[Fault]:
    """rollout_batch_size × n_samples_per_prompt = global_batch_size × num_steps_per_rollout."""
    names = ("rollout_batch_size", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout")
    prompts, samples, batch, steps = (s.given(name) and getattr(s, name) for name in names)
    if not prompts and not batch:
        prompts = _PROMPTS
    if not prompts and not (batch and steps):
        s.refuse("rollout_batch_size", "global_batch_size", "num_steps_per_rollout")
        return [Fault("rollout_batch_size", None, "a rollout needs a size", "set it to the prompts per rollout")]
    fault = None
    if prompts and samples and batch and steps:
        fault = _mismatch(prompts * samples, batch * steps)
    elif batch and steps and prompts:
        samples, fault = _share(batch * steps, prompts, "global_batch_size × num_steps_per_rollout", names[0])
    elif batch and steps:
        samples = samples or _samples(s)
        prompts, fault = _share(batch * steps, samples, "global_batch_size × num_steps_per_rollout", names[1])
    else:
        samples = samples or _samples(s)
        total, product = prompts * samples, "rollout_batch_size × n_samples_per_prompt"
        if batch:
            steps, fault = _share(total, batch, product, names[2])
        else:
            steps = steps or 1
            batch, fault = _share(total, steps, product, names[3])
    if fault:
        s.refuse(*names)
        return [fault]
    for name, value in zip(names, (prompts, samples, batch, steps), strict=True):
        s.fill(name, value)
    return []


def compares_samples(s: FlatSettings) -> bool:
    """Return whether a prompt with a single response has an advantage of 0."""
    has_teacher = s.use_opd and s.opd_kl_coef > 0
    return s.advantage_estimator in COMPARES_SAMPLES and s.rewards_normalization and not has_teacher


def asks_for_megatron(s: FlatSettings, key: str) -> bool:
    """Return whether a setting of the section Megatron has an effect that only Megatron-Core has."""
    return _asks(s, key, 1 if key == "expert_tensor_parallel_size" else catalog()[key].default)


def _asks(s: FlatSettings, key: str, nothing: object) -> bool:
    """Return whether a setting was given, and not as the value that asks for nothing."""
    return not s.is_valid(key) or (s.given(key) and getattr(s, key) not in (False, nothing))


def _samples(s: FlatSettings) -> int:
    return _RESPONSES if s.num_rollout != 0 and compares_samples(s) else 1


def _mismatch(generated: int, trained: int) -> Fault | None:
    if generated == trained:
        return None
    problem = f"global_batch_size × num_steps_per_rollout = {trained}"
    return Fault("rollout_batch_size × n_samples_per_prompt", generated, problem, "set one of them to match")


def _share(total: int, divisor: int, product: str, name: str) -> tuple[int, Fault | None]:
    """Return total / divisor, or a fault when it is not an integer."""
    if total % divisor == 0:
        return total // divisor, None
    nearby = [d for d in range(max(1, divisor - _SEARCHED), divisor + _SEARCHED) if total % d == 0]
    fitting = [str(d) for d in (max([d for d in nearby if d < divisor], default=0), min(_above(nearby, divisor))) if d]
    remedy = f"set {name} to {' or '.join(fitting)}" if fitting else "choose one that does"
    return 0, Fault(product, total, f"{name} = {divisor} does not divide it", remedy)


def _above(numbers: list[int], bound: int) -> list[int]:
    return [number for number in numbers if number > bound] or [0]


def _fallbacks(s: FlatSettings) -> list[Fault]:
    for key, source in FALLBACKS.items():
        if not s.is_valid(key) or s.given(key):
            continue
        if s.is_valid(source):
            s.fill(key, getattr(s, source))
        else:
            s.refuse(key)
    return []


def _run_dir(s: FlatSettings) -> list[Fault]:
    if not s.given("run_dir"):
        s.fill("run_dir", f"runs/{s.name}")
    return []


def _bounds(s: FlatSettings) -> list[Fault]:
    if not s.given("tis_lower_bound"):
        s.fill("tis_lower_bound", 1 / s.tis_upper_bound)
    if not s.given("rs_lower_bound"):
        s.fill("rs_lower_bound", s.tis_lower_bound)
    if not s.given("rs_upper_bound"):
        s.fill("rs_upper_bound", s.tis_upper_bound)
    return []


def _evaluation_alone(s: FlatSettings) -> list[Fault]:
    if s.num_rollout == 0 and (s.eval_prompt_data or s.eval_config) and not s.given("eval_interval"):
        s.fill("eval_interval", 1)
    return []


def _dumps(s: FlatSettings) -> list[Fault]:
    if not s.given("debug_train_only"):
        s.fill("debug_train_only", s.load_debug_rollout_data is not None)
    if s.dump_details is not None:
        folder = s.dump_details.rstrip("/").replace("{", "{{").replace("}", "}}")
        for key, name in (
            ("save_debug_rollout_data", "rollout_data/{rollout_id}.pt"),
            ("save_debug_train_data", "train_data/{rollout_id}_{rank}.pt"),
        ):
            if not s.given(key) and not (key == "save_debug_train_data" and s.debug_rollout_only):
                s.fill(key, f"{folder}/{name}")
    return []


def _lengths(s: FlatSettings) -> list[Fault]:
    if not s.given("rollout_max_response_len") and s.rollout_max_context_len is None:
        s.fill("rollout_max_response_len", _RESPONSE_TOKENS)
    return []


def _engine_name(s: FlatSettings) -> list[Fault]:
    if not s.given("rollout_backend"):
        asked = any(_asks(s, key, catalog()[key].default) for key in SGLANG_ALONE) or s.sglang_args
        s.fill("rollout_backend", "sglang" if asked else "torch")
    return []


def _trainer_name(s: FlatSettings) -> list[Fault]:
    if not s.given("train_backend"):
        own = (key for key, entry in catalog().items() if entry.section == "megatron")
        s.fill("train_backend", "megatron" if any(asks_for_megatron(s, key) for key in own) else "fsdp")
    return []


def _train_dtype(s: FlatSettings) -> list[Fault]:
    if not s.given("train_dtype"):
        s.fill("train_dtype", "float16" if s.fp16 else AUTO)
    return []


def _backend(s: FlatSettings) -> list[Fault]:
    if not s.given("share_prompts"):
        s.fill("share_prompts", s.train_backend == "fsdp")
    if not s.given("expert_tensor_parallel_size"):
        s.fill("expert_tensor_parallel_size", 1 if s.expert_model_parallel_size > 1 else s.tensor_model_parallel_size)
    if not s.given("sequence_parallel"):
        s.fill("sequence_parallel", s.tensor_model_parallel_size > 1 and s.expert_model_parallel_size > 1)
    return []


def _models(s: FlatSettings) -> list[Fault]:
    if not s.given("ref_load") and (s.use_kl_loss or s.kl_coef):
        s.fill("ref_load", s.hf_checkpoint)
    if not s.given("critic_load") and s.advantage_estimator == "ppo":
        s.fill("critic_load", s.hf_checkpoint)
    if not s.given("critic_lr") and s.advantage_estimator == "ppo":
        s.fill("critic_lr", s.lr)
    return []


def _staleness(s: FlatSettings) -> list[Fault]:
    """Derive the smallest bound that the other settings need."""
    if not s.given("max_weight_staleness"):
        batches = -(-(s.over_sampling_batch_size or 1) // s.rollout_batch_size)
        s.fill("max_weight_staleness", max(batches, s.update_weights_interval, 2 if s.partial_rollout else 1) - 1)
    return []


def _engine(s: FlatSettings) -> list[Fault]:
    if not s.given("max_running_requests"):
        s.fill("max_running_requests", engine_spec(s.rollout_backend).default_max_running_requests)
    if not s.given("offload_rollout"):
        s.fill("offload_rollout", s.colocate)
    return []


_STEPS: tuple[Callable[[FlatSettings], list[Fault]], ...] = (
    _batch_sizes,
    _staleness,
    _trainer_name,
    _engine_name,
    _engine,
    _lengths,
    _fallbacks,
    _run_dir,
    _bounds,
    _evaluation_alone,
    _dumps,
    _train_dtype,
    _backend,
    _models,
)
