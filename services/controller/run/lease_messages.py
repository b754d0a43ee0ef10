"""The lease messages that rollouts get: a prompt group and how to sample each of its responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles.rpc.gen import rollout_pb2
from miles.services.controller.run.seeds import sample_seeds
from miles.types import SampleGroup
from miles.types.convert import encode_pending_group

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.config.eval_sets import EvalSet


def training_lease(
    config: JobConfig, group: SampleGroup, attempt: int, version: int, newest_version: int
) -> rollout_pb2.GroupLease:
    """A lease of a training group, generated with `version` or a later one, of which `newest_version` is the last.

    `group` holds one sample, with the prompt of all of them.
    """
    rollout = config.rollout
    lease = _lease(group, attempt, config.data.n_samples_per_prompt, rollout.rollout_seed, "train")
    lease.purpose = rollout_pb2.GROUP_PURPOSE_TRAIN
    lease.min_version, lease.newest_version = version, newest_version
    lease.sampling.add(
        temperature=rollout.rollout_temperature,
        top_p=rollout.rollout_top_p,
        top_k=rollout.rollout_top_k,
        max_new_tokens=_response_limit(
            rollout.rollout_max_response_len, rollout.rollout_max_context_len, group.samples[0].prompt_length
        ),
        stop=rollout.rollout_stop or (),
        stop_token_ids=rollout.rollout_stop_token_ids or (),
        skip_special_tokens=rollout.rollout_skip_special_tokens,
    )
    return lease


def evaluation_lease(
    config: JobConfig, dataset: EvalSet, group: SampleGroup, attempt: int, version: int
) -> rollout_pb2.GroupLease:
    """A lease of an evaluation group, generated with exactly `version`; `group` as for `training_lease`."""
    rollout = config.rollout
    lease = _lease(group, attempt, dataset.n_samples, rollout.rollout_seed, f"eval/{dataset.name}")
    lease.purpose = rollout_pb2.GROUP_PURPOSE_EVAL
    lease.exact_version = version
    lease.sampling.add(
        temperature=dataset.temperature,
        top_p=dataset.top_p,
        top_k=dataset.top_k,
        min_new_tokens=dataset.min_new_tokens,
        max_new_tokens=_response_limit(
            dataset.max_response_len, rollout.rollout_max_context_len, group.samples[0].prompt_length
        ),
        stop=dataset.stop,
        stop_token_ids=dataset.stop_token_ids,
        skip_special_tokens=rollout.rollout_skip_special_tokens,
    )
    return lease


def _lease(group: SampleGroup, attempt: int, samples: int, seed: int, stream: str) -> rollout_pb2.GroupLease:
    """So many samples of one prompt, which differ in index and seed alone: the worker copies the first.

    Its parts are written where they belong, because a message is copied into another.
    """
    lease = rollout_pb2.GroupLease(
        group_id=group.group_id, attempt=attempt, seeds=sample_seeds(seed, stream, group.group_id, samples)
    )
    encode_pending_group(group, lease.group)
    return lease


def _response_limit(max_response: int | None, max_context: int | None, prompt_tokens: int) -> int:
    limits = [max_response] if max_response is not None else []
    if max_context is not None:
        limits.append(max(1, max_context - prompt_tokens))
    if not limits:
        raise ValueError("neither rollout_max_response_len nor rollout_max_context_len is set; set one of them")
    return min(limits)
