"""Derives settings that are not given from others."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable

from miles.config.schema.backend_choice import asks_of_engine, asks_of_trainer
from miles.config.schema.catalog import SECTIONS
from miles.config.schema.drafts import derive_drafts
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings, InvalidSetting
from miles.config.schema.other_values import take_other_names
from miles.config.schema.precision_variables import not_given
from miles.config.schema.teacher_functions import take_teacher_functions
from miles.engine_spec import engine_spec
from miles.extensions.names import FULLY_ASYNC_ROLLOUTS, MIS_FUNCTIONS
from miles.policy_loss_spec import LOSS_OF_ESTIMATOR, POLICY_LOSS_SPECS
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

COMPARES_SAMPLES = (
    "grpo",
    "gspo",
    "cispo",
    "dr_grpo",
    "rloo",
    "reinforce_plus_plus_baseline",
    "maxrl",
    "gdpo",
    "optimal_token_baseline",
)
"""Advantage estimators that compare the responses to a prompt."""

PLAIN_EPS_CLIP = 0.2
"""eps_clip of losses that do not read it."""
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
    if not all(s.is_valid(name) for name in names):
        s.refuse(*names)  # none follows from the others, and no later step may use one that has no value
        return []
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


def _masked_importance_sampling(s: FlatSettings) -> list[Fault]:
    if s.custom_tis_function_path in MIS_FUNCTIONS and not s.given("use_mis"):
        s.fill("use_mis", True)
    return []


def compares_samples(s: FlatSettings) -> bool:
    """Return whether a prompt with a single response has an advantage of 0."""
    has_teacher = s.use_opd and s.opd_kl_coef > 0
    return s.advantage_estimator in COMPARES_SAMPLES and s.rewards_normalization and not has_teacher


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


def _policy_loss(s: FlatSettings) -> list[Fault]:
    """Choose the loss, and clip as its paper does."""
    if not s.given("policy_loss_type"):
        s.fill("policy_loss_type", LOSS_OF_ESTIMATOR.get(s.advantage_estimator, "ppo_clip"))
    spec = POLICY_LOSS_SPECS[s.policy_loss_type]
    if not s.given("eps_clip"):
        default = PLAIN_EPS_CLIP if spec.eps_clip is None else spec.eps_clip
        if not s.given("eps_clip_high"):
            s.fill("eps_clip_high", default if spec.eps_clip_high is None else spec.eps_clip_high)
        s.fill("eps_clip", default)
    return []


def _fallbacks(s: FlatSettings) -> list[Fault]:
    for key, source in FALLBACKS.items():
        if not s.is_valid(key) or s.given(key) or not s.is_empty(key):
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
    if s.tis_threshold is not None and not s.given("tis_clip"):
        s.fill("tis_clip", s.tis_threshold)
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


def _precision_variables(s: FlatSettings) -> list[Fault]:
    """Variables of the trainer's ranks that choose a format are settings here, so that engines get it too."""
    for asked in not_given(s, s.train_env_vars):
        s.fill(asked.key, asked.value)
    return []


def _engine_name(s: FlatSettings) -> list[Fault]:
    """Where the machine is not known, what every machine has: `miles.config.backends` knows it."""
    if s.rollout_backend == "auto":
        s.fill("rollout_backend", (asks_of_engine(s) or ("torch",))[0])
    return []


def _trainer_name(s: FlatSettings) -> list[Fault]:
    """See `_engine_name`."""
    if s.train_backend == "auto":
        s.fill("train_backend", (asks_of_trainer(s) or ("fsdp",))[0])
    return []


def _train_dtype(s: FlatSettings) -> list[Fault]:
    if not s.given("train_dtype"):
        s.fill("train_dtype", "float16" if s.fp16 else "bfloat16" if s.bf16 else AUTO)
    return []


def _optimizer(s: FlatSettings) -> list[Fault]:
    """On a CPU everything is where offloading moves it, and Adam computes as the precision-aware one does."""
    if s.device == "cpu" and s.train_backend == "megatron":
        why = "device = cpu has the optimizer's state in host memory, and in float32"
        for key in ("optimizer_cpu_offload", "overlap_cpu_optimizer_d2h_h2d", "use_precision_aware_optimizer"):
            if getattr(s, key):
                s.replace(key, False, why)
    return []


def _backend(s: FlatSettings) -> list[Fault]:
    if not s.given("share_prompts"):
        s.fill("share_prompts", s.train_backend == "fsdp")
    if not s.given("expert_tensor_parallel_size"):
        s.fill("expert_tensor_parallel_size", 1 if s.expert_model_parallel_size > 1 else s.tensor_model_parallel_size)
    if not s.given("use_precision_aware_optimizer"):
        s.fill("use_precision_aware_optimizer", s.optimizer_cpu_offload)
    if not s.given("use_distributed_optimizer"):
        s.fill("use_distributed_optimizer", s.use_precision_aware_optimizer)
    if not s.given("sequence_parallel"):
        s.fill("sequence_parallel", s.tensor_model_parallel_size > 1 and s.expert_model_parallel_size > 1)
    if not s.given("attention_backend") and s.use_flash_attn:
        s.fill("attention_backend", "flash")
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
    if not s.given("max_weight_staleness"):
        s.fill("max_weight_staleness", needed_staleness(s))
    if s.max_weight_staleness == 0 and s.keep_old_actor:
        why = "with max_weight_staleness = 0 every response is of the version that is trained, and no other is kept"
        s.replace("keep_old_actor", False, why)
    return []


def needed_staleness(s: FlatSettings) -> int:
    """Return the smallest bound that the other settings need."""
    batches = -(-(s.over_sampling_batch_size or 1) // s.rollout_batch_size)
    least = 3 if s.rollout_function_path in FULLY_ASYNC_ROLLOUTS else 2 if s.partial_rollout else 1
    return max(int(batches), int(s.update_weights_interval), least) - 1


def _colocated_engines(s: FlatSettings) -> list[Fault]:
    """Engines that take turns with the trainer have all of its GPUs, as far as one node has them."""
    per_node, share = s.actor_num_gpus_per_node, s.rollout_num_gpus_per_engine * s.rollout_num_workers
    if not s.colocate or per_node is None or s.rollout_external_engine_addrs is not None:
        return []
    gpus, asked = s.actor_num_nodes * per_node, s.rollout_num_gpus
    whole = gpus // share * share
    if asked is not None and asked > gpus and whole:
        s.replace("rollout_num_gpus", whole, f"colocate runs engines on the trainer's {gpus} GPUs")
    elif asked is None and s.rollout_backend == "sglang" and s.device == "cuda" and s.actor_num_nodes == 1 and whole:
        s.fill("rollout_num_gpus", whole)
    return []


def _engine(s: FlatSettings) -> list[Fault]:
    if not s.given("max_running_requests"):
        s.fill("max_running_requests", engine_spec(s.rollout_backend).default_max_running_requests)
    if not s.given("offload_rollout"):
        s.fill("offload_rollout", s.colocate or s.offload)
    if not s.given("offload_train") and s.offload:
        s.fill("offload_train", True)
    return []


_STEPS: tuple[Callable[[FlatSettings], list[Fault]], ...] = (
    take_teacher_functions,
    _precision_variables,
    _trainer_name,
    _engine_name,
    take_other_names,
    _batch_sizes,
    _staleness,
    _colocated_engines,
    _engine,
    _lengths,
    _policy_loss,
    _fallbacks,
    _run_dir,
    derive_drafts,
    _masked_importance_sampling,
    _bounds,
    _evaluation_alone,
    _dumps,
    _train_dtype,
    _optimizer,
    _backend,
    _models,
)
