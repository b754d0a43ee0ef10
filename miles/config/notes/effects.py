"""Notes on settings that have no effect beside others, and that recipes carry along."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.eval_sets import evaluates
from miles.config.notes.registry import Note, noted
from miles.config.schema.catalog import catalog
from miles.config.schema.derivation import FALLBACKS
from miles.config.schema.flat_settings import FlatSettings


@noted
def replaced_values(s: FlatSettings) -> Iterator[Note]:
    for key, (value, why) in s.replaced.items():
        yield Note(key, value, why)


@noted
def nothing_is_evaluated(s: FlatSettings) -> Iterator[Note]:
    if evaluates(s) and s.eval_interval is None:
        key = "eval_config" if s.eval_config else "eval_prompt_data"
        value = getattr(s, key)
        shown = value if isinstance(value, str) else list(value)
        yield Note(key, shown, "without eval_interval it is never evaluated on")
    if evaluates(s):
        return
    for key, entry in catalog().items():
        derived = key in FALLBACKS and getattr(s, key) == getattr(s, FALLBACKS[key])
        if entry.section == "eval" and _is_said(s, key) and not derived:
            yield Note(key, getattr(s, key), "nothing is evaluated without eval_prompt_data")


@noted
def responses_end_with_the_context(s: FlatSettings) -> Iterator[Note]:
    context = s.rollout_max_context_len
    for key in ("rollout_max_response_len", "eval_max_response_len"):
        length = getattr(s, key)
        if context is not None and length is not None and length >= context and s.given(key):
            yield Note(key, length, f"responses end earlier, as prompt and response share {context} tokens")


@noted
def micro_batches_are_cut_one_way(s: FlatSettings) -> Iterator[Note]:
    if s.use_dynamic_batch_size and s.micro_batch_size != 1:
        yield Note("micro_batch_size", s.micro_batch_size, "use_dynamic_batch_size cuts micro-batches by tokens")
    if not s.use_dynamic_batch_size:
        for key in ("max_tokens_per_gpu", "log_probs_max_tokens_per_gpu"):
            if _is_said(s, key):
                why = f"without use_dynamic_batch_size micro-batches have {s.micro_batch_size} samples each"
                yield Note(key, getattr(s, key), why)


@noted
def nothing_is_split(s: FlatSettings) -> Iterator[Note]:
    if s.train_backend == "megatron" and s.sequence_parallel and s.tensor_model_parallel_size == 1:
        yield Note("sequence_parallel", True, "tensor_model_parallel_size = 1 leaves nothing to split")


@noted
def kernels_are_those_of_transformer_engine(s: FlatSettings) -> Iterator[Note]:
    if s.train_backend != "megatron" or not (s.transformer_impl == "local" or s.device == "cpu"):
        return
    where = "transformer_impl = local" if s.transformer_impl == "local" else "device = cpu"
    for key in ("apply_rope_fusion", "bias_swiglu_fusion", "bias_dropout_fusion"):
        if s.given(key) and getattr(s, key) != catalog()[key].default:
            yield Note(key, getattr(s, key), f"with {where} layers have PyTorch's kernels anyway")


@noted
def nothing_is_observed(s: FlatSettings) -> Iterator[Note]:
    if s.echo_loss_coef and s.custom_generate_function_path is None:
        why = "it does nothing without custom_generate_function_path: no other response has tokens of observations"
        yield Note("echo_loss_coef", s.echo_loss_coef, why)


@noted
def the_policy_stays_as_it_is(s: FlatSettings) -> Iterator[Note]:
    if s.advantage_estimator == "ppo" and s.num_rollout and s.num_critic_only_steps >= s.num_rollout:
        why = f"num_rollout = {s.num_rollout} leaves none to train the policy on: only the critic is trained"
        yield Note("num_critic_only_steps", s.num_critic_only_steps, why)


def _is_said(s: FlatSettings, key: str) -> bool:
    value = getattr(s, key)
    return s.given(key) and value is not False and value != catalog()[key].default
