"""What samples take in host memory when all are as long as they may be: in Redis, rollouts, the trainer's ranks."""

from __future__ import annotations

from miles.memory.amount import Part
from miles.memory.megatron import layout_of
from miles.memory.run import Run
from miles.memory.sequences import (
    Routing,
    SampleSize,
    first_rank_bytes,
    rank_bytes,
    redis_bytes,
    rollout_bytes,
    step_bytes,
)


def longest_sample(run: Run) -> SampleSize:
    """Return the longest prompt with the longest response."""
    s, shape = run.settings, run.policy.shape
    routing = None
    if shape is not None and shape.experts and (s.use_rollout_routing_replay or s.observe_rollout_routing):
        routing = Routing(len(shape.expert_layers), shape.experts_per_token, shape.experts)
    response = min(run.longest - 1, s.rollout_max_response_len or run.longest)
    return SampleSize(prompt_tokens=run.longest - response, response_tokens=response, routing=routing)


def queue_part(run: Run) -> Part:
    """Return what Redis holds of finished groups: those that no checkpoint covers yet, and those ahead of them."""
    s, sample = run.settings, longest_sample(run)
    steps = s.save_interval or s.num_rollout or 1
    groups = s.rollout_batch_size * (steps + s.max_weight_staleness + 1)
    nbytes = redis_bytes(sample, samples_per_group=s.n_samples_per_prompt, queued_groups=groups, running_groups=0)
    unsaved = "save_interval" if s.save_interval else "num_rollout"
    formula = (
        f"at most rollout_batch_size × n_samples_per_prompt × ({unsaved} + max_weight_staleness + 1) = "
        f"{groups * s.n_samples_per_prompt} samples × {_words(sample)}"
    )
    return Part("finished groups", nbytes, formula)


def rollout_samples_part(run: Run) -> Part:
    """Return what one rollout service holds of samples: all that may run, and a group on its way to the queue."""
    s, sample = run.settings, longest_sample(run)
    groups = -(-s.rollout_batch_size * (s.max_weight_staleness + 1) // s.rollout_num_workers)
    nbytes = rollout_bytes(
        sample,
        running_samples=groups * s.n_samples_per_prompt,
        groups_being_put=1,
        samples_per_group=s.n_samples_per_prompt,
    )
    formula = f"at most {groups} running groups and one being queued × {s.n_samples_per_prompt} × {_words(sample)}"
    return Part("running samples", nbytes, formula)


def rank_samples_part(run: Run, rank: int) -> Part:
    """Return what a trainer's rank holds of a step's samples: rank 0 reads them all, the others their share."""
    s, sample = run.settings, longest_sample(run)
    samples = s.rollout_batch_size * s.n_samples_per_prompt
    replicas = layout_of(run).replicas if s.train_backend == "megatron" else run.ranks
    held = (
        first_rank_bytes(sample, samples=samples, ranks=run.ranks)
        if rank == 0
        else rank_bytes(sample, samples=samples, replicas=replicas)
    )
    formula = f"{samples} samples × {_words(sample)}, {'all' if rank == 0 else 'routing of its share'}, and rows"
    return Part("samples of a step", held + step_bytes(sample, samples=samples, replicas=replicas), formula)


def _words(sample: SampleSize) -> str:
    each = f"{sample.tokens} tokens, {sample.payload_bytes / 1e6:.3g} MB"
    if (routing := sample.routing) is None:
        return each
    return f"{each} with {routing.bytes_per_token} bytes a token of routing in {routing.layers} layers"
