"""The command line of an SGLang server, from our settings and SGLang's own flags."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from miles.config.sglang.server_flags import server_flags
from miles.config.speculation import speculation_of
from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.server.served_model import ServedModel
from miles.services.rollout.engines.sglang.speculative.drafting_flags import most_requests, runs_draft_model

DRAFT_ALGORITHMS = ("EAGLE", "EAGLE3", "STANDALONE")
"""Speculative algorithms whose draft model has weights of its own."""

ACCEPTANCE_THRESHOLDS = ("speculative_accept_threshold_single", "speculative_accept_threshold_acc")

KEEP_WORKSPACES, DRAIN = "miles_in_server.keep_workspaces", "miles_in_server.drain"
"""Functions that servers can import and call; see `in_server`."""
_CUSTOM_LOADERS = "custom_weight_loader"

SPARE_TOKENS = 6
"""Tokens of its context that SGLang reserves: it refuses a longer input and truncates a longer response."""


def command(
    options: SglangOptions, index: int, port: int, model: ServedModel, drafting: Mapping[str, Any] | None = None
) -> list[str]:
    """The command that starts server number `index` on a port of the loopback device.

    SGLang refuses to start with a longer context than the model's positions. `drafting`: flags of speculative decoding
    that follow from the job's.
    """
    arguments = [options.python, "-m", "sglang.launch_server"]
    arguments += ["--model-path", model.folder, "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--dtype", options.dtype, "--device", "cuda" if options.on_gpu else "cpu"]
    arguments += ["--random-seed", str(options.random_seed + index)]
    # Warm-up requests would be generated with the checkpoint's weights; our requests wait for the first version.
    arguments += ["--skip-server-warmup", "--incremental-streaming-output"]
    arguments += ["--tp-size", str(options.gpus_of(index))]
    if options.on_gpu:
        arguments += ["--base-gpu-id", str(options.first_gpu_of(index))]
    else:
        arguments += ["--sleep-on-idle"]  # an idle scheduler would poll a core
    if options.max_total_tokens is not None and options.max_total_tokens + SPARE_TOKENS <= model.max_positions:
        arguments += ["--context-length", str(options.max_total_tokens + SPARE_TOKENS)]
    if not model.has_weights:
        arguments += ["--load-format", "dummy"]
        if has_draft_weights(options.server_flags) and "speculative_draft_load_format" not in options.server_flags:
            arguments += ["--speculative-draft-load-format", "auto"]
    most = options.max_running_requests
    drafts = speculation_of(options.server_flags)
    if most is None and drafts.is_on:
        most = most_requests(drafts, {**(drafting or {}), **options.server_flags}, options.concurrency)
    if most is not None:
        arguments += ["--max-running-requests", str(most)]
    if options.routed_experts:
        arguments += ["--enable-return-routed-experts"]
    if options.on_gpu and (options.routed_experts or options.recipe is not None):
        # A fused shared expert would count among those that a token is routed to, and be quantised as they are.
        arguments += ["--disable-shared-experts-fusion"]
    if options.memory_saver:
        arguments += ["--enable-memory-saver"]
        if runs_draft_model(drafts) and "enable_draft_weights_cpu_backup" not in options.server_flags:
            # Versions of the policy do not bring back the draft's weights, and of the draft there may never be one. No
            # version brings back what a draft has computed once, as its tables of positions.
            arguments += ["--enable-draft-weights-cpu-backup"]
    flags = {**(drafting or {}), **options.flags_of(index)}
    if options.recipe is not None:
        flags[_CUSTOM_LOADERS] = [KEEP_WORKSPACES, DRAIN, *_custom_loaders(flags)]
    return [*arguments, *passed_through(flags)]


def passed_through(flags: Mapping[str, Any]) -> Iterator[str]:
    """SGLang's own flags as arguments: a switch is named when it is on, and --no-… turns off one that has it."""
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        match value:
            case False if (known := server_flags().get(name)) is not None and known.kind == "toggle":
                yield "--no-" + flag[2:]
            case None | False:
                continue
            case True:
                yield flag
            case list() | tuple():
                yield flag
                yield from (str(item) for item in value)
            case dict():
                yield f"{flag}={json.dumps(value)}"
            case _:
                yield f"{flag}={value}"


def has_draft_weights(flags: Mapping[str, Any]) -> bool:
    """Whether a server with these flags has a draft model whose weights are not the policy's own.

    A server that drafts by the policy's MTP layers says of itself that its draft is in the policy's folder.
    """
    algorithm = str(flags.get("speculative_algorithm") or "").upper()
    folder = flags.get("speculative_draft_model_path")
    of_policy = algorithm == "EAGLE" and folder == flags.get("model_path")
    return algorithm in DRAFT_ALGORITHMS and folder is not None and not of_policy


def has_functions(flags: Mapping[str, Any]) -> bool:
    """Whether a server with these flags can call those of `in_server`."""
    return {KEEP_WORKSPACES, DRAIN} <= set(_custom_loaders(flags))


def _custom_loaders(flags: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(flags.get(_CUSTOM_LOADERS) or ())


def lossy_acceptance(flags: Mapping[str, Any]) -> str:
    """Which flags have speculative decoding accept tokens that the policy would sample less often; "" when none has."""
    values = {name: flags.get(name) for name in ACCEPTANCE_THRESHOLDS}
    return ", ".join(f"{name} = {value}" for name, value in values.items() if value is not None and float(value) != 1)


def may_compute_ahead(flags: Mapping[str, Any]) -> bool:
    """Whether a server with these flags may still compute after it has processed the results of every step.

    Others have nothing on their GPU then: the result of a step is there when the step has ended.
    """
    pipeline = int(flags.get("pp_size") or 1) > 1
    return pipeline or bool(flags.get("speculative_algorithm") or flags.get("enable_dp_attention"))


def is_deterministic(flags: Mapping[str, Any]) -> bool:
    """Whether the server honours the seed of a request."""
    return bool(flags.get("enable_deterministic_inference"))
