"""The model to train, the inference engine, and sampling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from miles.config.schema.section import (
    Derived,
    DottedPath,
    Metavar,
    NonNegative,
    NonNegativeFloat,
    Passthrough,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    derived,
)
from miles.engine_spec import EngineName
from miles.extensions.names import DYNAMIC_FILTERS

MAX_GPUS = 1 << 16
"""Of all engines of a run: each server of theirs is planned by itself."""


class RolloutConfig(Section):
    """Engine and sampling. Lengths are in tokens."""

    hf_checkpoint: Annotated[str | None, Metavar("DIR")] = None
    """Hugging Face folder with tokenizer, model config and initial weights; required."""

    model_name: str | None = None
    """Name that begins with the family of hf_checkpoint, e.g. qwen3-30b-a3b, to be sure of the folder; weights are
    converted as its config.json says, with a name or without."""

    rollout_backend: Literal["auto", EngineName] = "auto"
    """Inference engine: torch runs inside the rollout service, sglang uses one or several SGLang servers; auto takes
    the one that other settings ask for, and otherwise sglang on a machine with a GPU where it is installed, and torch
    elsewhere."""

    rollout_num_gpus: Annotated[
        Annotated[int, Field(gt=0, le=MAX_GPUS)] | None,
        Derived("the trainer's GPUs, for SGLang servers on one node with colocate"),
    ] = None
    """Number of GPUs of all engines; divided by rollout_num_gpus_per_engine it is the number of SGLang servers, which
    are spread evenly over the rollout services; not given means one server per service."""

    rollout_num_gpus_per_engine: Positive = 1
    """Number of GPUs of each SGLang server, which is its tensor-parallel size."""

    sglang_config: Annotated[str | None, Metavar("FILE")] = None
    """YAML or JSON file of groups of SGLang servers that differ in GPUs, tensor-parallel size and flags, instead of
    rollout_num_gpus alike ones; services on other machines read it under the same path."""

    rollout_external_engine_addrs: Annotated[tuple[str, ...] | None, Metavar("HOST:PORT ...")] = None
    """Addresses of running SGLang servers to use instead of starting some, assigned round-robin to the rollout
    services."""

    rollout_engine_python: Annotated[str | None, Metavar("FILE")] = None
    """Python interpreter of the SGLang installation; defaults to that of the rollout service."""

    rollout_engine_weights: Literal["tensor", "disk", "distributed"] = "tensor"
    """How weights are loaded into SGLang servers: through memory shared with the rollout service on the same host
    (tensor), through files that servers on other hosts must see under the same path (disk), or by taking part in the
    trainer's broadcasts (distributed)."""

    rollout_engine_weights_dir: Annotated[str | None, Metavar("DIR")] = None
    """Folder for the files of rollout_engine_weights = disk; defaults to the system's temporary folder."""

    rollout_health_check_interval: PositiveFloat = 1.0
    """Time between two probes of an SGLang server, in seconds; each also tells how much it has to do, by which its
    share of the requests is limited."""

    rollout_health_check_timeout: PositiveFloat = 30.0
    """Time without an answer after which an SGLang server counts as dead and is restarted, in seconds."""

    rollout_health_check_first_wait: NonNegativeFloat = 0.0
    """Time between a server's start, once it is ready, and its first probe, in seconds."""

    sglang_server_concurrency: Positive = 512
    """Maximum number of concurrent requests to each SGLang server; fewer while its KV cache is nearly full."""

    rollout_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Data type of the weights in engines, in which the trainer publishes them; auto is decided at the start of the
    run: train_dtype if it is given, else bfloat16 where trainer and engines are fast in it (GPUs, and CPUs with
    bfloat16 instructions), float32 elsewhere."""

    max_running_requests: Annotated[Positive | None, Derived("64 with torch; SGLang decides for itself")] = None
    """Maximum number of responses that an engine decodes at once."""

    rollout_temperature: PositiveFloat = 1.0
    """Sampling temperature, which the trainer's log-probabilities use too."""

    rollout_top_p: Probability = 1.0
    """Nucleus (top-p) sampling: probability mass of the most likely tokens to sample from."""

    rollout_top_k: Annotated[int, Field(ge=-1)] = -1
    """Top-k sampling: number of the most likely tokens to sample from; -1 means all."""

    rollout_max_context_len: Positive | None = None
    """Maximum length of prompt and response together."""

    rollout_max_prompt_len: Positive | None = None
    """Maximum length of a prompt; longer ones are skipped when the data set is read."""

    rollout_max_response_len: Annotated[Positive | None, Derived("8192 without rollout_max_context_len")] = None
    """Maximum length of a response."""

    rollout_stop: tuple[str, ...] | None = None
    """Stop strings."""

    rollout_stop_token_ids: tuple[NonNegative, ...] | None = None
    """Stop tokens, in addition to the model's end-of-sequence token."""

    rollout_skip_special_tokens: bool = False
    """Remove special tokens from the text of responses."""

    rollout_shuffle: bool = False
    """Shuffle the prompts in every epoch."""

    rollout_seed: int = 42
    """Seed of shuffling and sampling."""

    dynamic_sampling_filter_path: Annotated[str | None, DottedPath(aliases=DYNAMIC_FILTERS), Metavar("MODULE.NAME")] = (
        None
    )
    """Function (args, samples) that keeps or drops a scored group before it is queued; the built-in
    miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std drops groups whose rewards are all
    equal, check_no_aborted those with a sample that failed."""

    dynamic_sampling_max_dropped_batches: NonNegative = 16
    """How many batches' worth of groups may be dropped in a row, with none kept between, before the job fails; 0 means
    any number."""

    max_weight_staleness: Annotated[
        NonNegative, Derived("what over_sampling_batch_size, partial_rollout and update_weights_interval need, else 0")
    ] = derived()
    """Staleness bound: maximum number of weight versions (training steps) between a sample's oldest token and the
    weights it trains; 0 is synchronous, 1 one-step off-policy, more is fully asynchronous."""

    over_sampling_batch_size: Positive | None = None
    """Maximum number of prompts that are started and not trained on yet; not given means as many as
    max_weight_staleness allows. Values above rollout_batch_size compensate for stragglers and dropped groups; surplus
    groups are kept for the next batch."""

    partial_rollout: bool = False
    """Preempt unfinished responses when a batch is complete, and resume them after the weight update."""

    mask_offpolicy_in_partial_rollout: bool = False
    """Mask the tokens of a response that were generated by an older version than its newest one."""

    use_rollout_routing_replay: bool = False
    """Train mixture-of-experts models with the routing of the engine (rollout routing replay)."""

    observe_rollout_routing: bool = False
    """Record the routing of the engine and report the share of tokens that the trainer routes differently
    (train/tokens_routed_differently), without replaying it."""

    sglang_args: Annotated[dict[str, Any], Passthrough("sglang_")] = Field(default_factory=dict)
    """Flags of the SGLang servers, under SGLang's own names; those that follow from other settings are refused."""

    @property
    def records_routing(self) -> bool:
        """Whether the engine records which experts it chooses."""
        return self.use_rollout_routing_replay or self.observe_rollout_routing
