"""The model that is trained, the engine that samples from it, and how it samples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from miles.config.schema.section import (
    Derived,
    DottedPath,
    Metavar,
    NonNegative,
    Passthrough,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    derived,
)
from miles.engine_spec import EngineName

NONZERO_STD_FILTER = "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
"""Name of the built-in filter in recipes; the rollout service knows which function it means."""


class RolloutConfig(Section):
    """Engine and sampling. Lengths are in tokens."""

    hf_checkpoint: Annotated[str | None, Metavar("DIR")] = None
    """Hugging Face folder with the tokenizer, the model's config and the initial weights. Required."""

    rollout_backend: EngineName = "torch"
    """The inference engine: torch runs in the rollout service, sglang is one or several SGLang servers beside it."""

    rollout_num_gpus: Positive | None = None
    """GPUs of all engines together; with rollout_num_gpus_per_engine it says how many SGLang servers there are, dealt
    evenly to the rollout services. Not given, each service has one."""

    rollout_num_gpus_per_engine: Positive = 1
    """GPUs of one SGLang server: its tensor-parallel size."""

    rollout_external_engine_addrs: Annotated[tuple[str, ...] | None, Metavar("HOST:PORT ...")] = None
    """SGLang servers that run already, dealt in turn to the rollout services; none is started then."""

    rollout_engine_python: Annotated[str | None, Metavar("FILE")] = None
    """Python interpreter that SGLang is installed for; not given, the rollout service's own."""

    rollout_engine_weights: Literal["tensor", "disk", "distributed"] = "tensor"
    """How weights get into SGLang servers: with tensor the rollout service shares memory with them, on the same host;
    with disk it writes files, which a server on another host must see under the same path; with distributed the servers
    take part in the trainer's broadcasts themselves."""

    rollout_engine_weights_dir: Annotated[str | None, Metavar("DIR")] = None
    """Folder for the files of rollout_engine_weights = disk; not given, the system's folder for temporary files."""

    rollout_health_check_timeout: PositiveFloat = 30.0
    """Seconds without an answer after which an SGLang server is taken for dead and started anew."""

    sglang_server_concurrency: Positive = 512
    """Requests that one SGLang server is given at once, at most; fewer while its key-value cache is nearly full."""

    rollout_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the weights that engines hold, and in which the trainer publishes them. With auto it is decided when the
    run starts: as train_dtype says, else bfloat16 where trainer and engines are fast in it (GPUs, and CPUs with
    bfloat16 instructions), float32 elsewhere."""

    max_running_requests: Annotated[Positive | None, Derived("64 with torch; SGLang decides for itself")] = None
    """Responses that one engine decodes at once."""

    rollout_temperature: PositiveFloat = 1.0
    """Divides the logits, when sampling and in the trainer's log-probabilities alike."""

    rollout_top_p: Probability = 1.0
    """Probability mass of the most likely tokens that are sampled from."""

    rollout_top_k: Annotated[int, Field(ge=-1)] = -1
    """Number of most likely tokens that are sampled from; -1 is all."""

    rollout_max_context_len: Positive | None = None
    """Limit of prompt and response together."""

    rollout_max_prompt_len: Positive | None = None
    """Prompts longer than this are left out when the data set is read."""

    rollout_max_response_len: Positive | None = None
    """Limit of a response. Required unless rollout_max_context_len is given."""

    rollout_stop: tuple[str, ...] | None = None
    """Texts that end a response."""

    rollout_stop_token_ids: tuple[NonNegative, ...] | None = None
    """Tokens that end a response, beside the model's own end token."""

    rollout_skip_special_tokens: bool = False
    """Leave special tokens out of a response's text."""

    rollout_shuffle: bool = False
    """Shuffle the prompts, anew for each epoch."""

    rollout_seed: int = 42
    """Seed of shuffling and of sampling."""

    dynamic_sampling_filter_path: Annotated[
        str | None, DottedPath(aliases=(NONZERO_STD_FILTER,)), Metavar("MODULE.NAME")
    ] = None
    """Function that keeps or drops a scored group before it is queued. Under its usual name,
    miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std, the built-in one drops groups whose
    rewards are all equal."""

    max_weight_staleness: Annotated[
        NonNegative, Derived("what over_sampling_batch_size, partial_rollout and update_weights_interval need, else 0")
    ] = derived()
    """Versions (training steps) that a sample's oldest token may be behind the weights it trains: 0 is synchronous, 1
    one step off, more is fully asynchronous."""

    over_sampling_batch_size: Positive | None = None
    """Prompts that are begun and not trained on yet, at most; not given, as many as max_weight_staleness allows. More
    than rollout_batch_size leaves room for stragglers and for what a filter drops; what is finished beyond a batch is
    kept for the next one."""

    partial_rollout: bool = False
    """When a batch is complete, interrupt the responses that are not, and go on with them after the weight update."""

    mask_offpolicy_in_partial_rollout: bool = False
    """Leave tokens out of the loss that an older version generated than the response's newest one."""

    use_rollout_routing_replay: bool = False
    """Train mixture-of-experts models with the experts that the engine chose."""

    sglang_args: Annotated[dict[str, Any], Passthrough("sglang_")] = Field(default_factory=dict)
    """Flags of the SGLang servers, under SGLang's own names. Those that follow from other settings are refused."""
