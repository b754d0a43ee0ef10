"""Rules about the trainer: micro-batches, ranks, learning-rate schedule, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import rule
from miles.config.schema.faults import Fault, show
from miles.config.schema.flat_settings import FlatSettings

_SET_BY_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@rule
def micro_batches_are_cut_one_way(s: FlatSettings) -> Iterator[Fault]:
    if s.use_dynamic_batch_size and s.max_tokens_per_gpu is None:
        problem = "max_tokens_per_gpu is not set"
        yield Fault("use_dynamic_batch_size", True, problem, "set max_tokens_per_gpu to the tokens of a micro-batch")


@rule
def batch_divides_over_ranks(s: FlatSettings) -> Iterator[Fault]:
    if s.actor_num_gpus_per_node is None:
        return  # it depends on the device, which is not resolved yet
    ranks = s.actor_num_nodes * s.actor_num_gpus_per_node
    what = "actor_num_nodes × actor_num_gpus_per_node"
    if s.train_backend == "megatron":
        ranks //= s.tensor_model_parallel_size * s.pipeline_model_parallel_size * s.context_parallel_size
        what = "the number of replicas (actor_num_nodes × actor_num_gpus_per_node / tensor / pipeline / context size)"
    if not ranks:
        return  # the layout needs more ranks than there are, which another rule reports
    if s.global_batch_size % ranks:
        problem = f"{what} = {ranks} does not divide it"
        yield Fault("global_batch_size", s.global_batch_size, problem, f"make it a multiple of {ranks}")
    elif not s.use_dynamic_batch_size and s.global_batch_size // ranks % s.micro_batch_size:
        share = s.global_batch_size // ranks
        problem = f"each of {ranks} replicas gets {share} samples a step, which it does not divide"
        yield Fault("micro_batch_size", s.micro_batch_size, problem, "choose one that does")


@rule
def skipping_the_log_prob_pass_is_possible(s: FlatSettings) -> Iterator[Fault]:
    readers = [key for key in ("use_mis", "keep_old_actor") if getattr(s, key)]
    if not s.use_rollout_logprobs:
        readers += [key for key in ("kl_coef", "use_opd") if getattr(s, key)]
    if s.num_steps_per_rollout > 1:
        readers.append("num_steps_per_rollout")
    if s.skip_actor_forward_only and readers:
        problem = f"{readers[0]} = {show(getattr(s, readers[0]))} reads log-probabilities from before the first step"
        yield Fault("skip_actor_forward_only", True, problem, "leave one of them out")


@rule
def retained_checkpoints_are_saved(s: FlatSettings) -> Iterator[Fault]:
    every, saved = s.save_retain_interval, s.save_interval
    if every is not None and saved is None:
        problem = "without save_interval there is one checkpoint, at the end"
        yield Fault("save_retain_interval", every, problem, "set save_interval, or leave it out")
    elif every is not None and saved is not None and every % saved:
        problem = f"save_interval = {saved} does not divide it"
        yield Fault("save_retain_interval", every, problem, f"make it a multiple of {saved}")


@rule
def offloading_is_said_once(s: FlatSettings) -> Iterator[Fault]:
    for key in ("offload_train", "offload_rollout"):
        if s.offload and not getattr(s, key):
            yield Fault(key, False, "offload = true asks for it", "leave one of them out")


@rule
def log_prob_chunks_are_a_count_or_minus_one(s: FlatSettings) -> Iterator[Fault]:
    if s.log_probs_chunk_size == 0 or s.log_probs_chunk_size < -1:
        problem = "it must be a number of rows, or -1 to choose it by the device"
        yield Fault("log_probs_chunk_size", s.log_probs_chunk_size, problem, "set it to 1024 or to -1")


@rule
def environment_leaves_ranks_alone(s: FlatSettings) -> Iterator[Fault]:
    for name in sorted(set(s.train_env_vars) & set(_SET_BY_THE_LAUNCHER)):
        problem = f"{name} is set for each rank by its launcher"
        yield Fault("train_env_vars", s.train_env_vars, problem, f"leave {name} out")


@rule
def compute_type_is_one(s: FlatSettings) -> Iterator[Fault]:
    for key, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        if getattr(s, key) and s.train_dtype != dtype:
            yield Fault(key, True, f"train_dtype = {s.train_dtype} says otherwise", "leave one of them out")


@rule
def schedule_rises_and_falls(s: FlatSettings) -> Iterator[Fault]:
    for key in ("min_lr", "lr_warmup_init"):
        for rate in ("lr", "critic_lr") if s.critic_lr not in (None, s.lr) else ("lr",):
            if s.given(key) and getattr(s, key) > getattr(s, rate):
                problem = f"{rate} = {getattr(s, rate):g} is below it"
                yield Fault(key, getattr(s, key), problem, f"lower it, or raise {rate}")
    if s.lr_warmup_iters and s.lr_warmup_fraction is not None:
        problem = f"lr_warmup_fraction = {s.lr_warmup_fraction:g} says the same another way"
        yield Fault("lr_warmup_iters", s.lr_warmup_iters, problem, "leave one of them out")
    if s.lr_decay_iters is not None and s.lr_warmup_iters >= s.lr_decay_iters:
        problem = f"lr_decay_iters = {s.lr_decay_iters} includes the warm-up"
        yield Fault("lr_warmup_iters", s.lr_warmup_iters, problem, "lower it, or raise lr_decay_iters")
    if s.lr_decay_iters is not None and s.critic_lr_warmup_iters >= s.lr_decay_iters:
        problem = f"lr_decay_iters = {s.lr_decay_iters} includes the warm-up"
        yield Fault("critic_lr_warmup_iters", s.critic_lr_warmup_iters, problem, "lower it, or raise lr_decay_iters")


@rule
def compiled_layers_are_dense_and_on_one_gpu(s: FlatSettings) -> Iterator[Fault]:
    if not s.torch_compile or s.train_backend != "fsdp":
        return  # another rule reports it with megatron
    reads_routers = ("use_routing_replay", "use_rollout_routing_replay", "observe_rollout_routing")
    replays = [key for key in reads_routers if getattr(s, key)]
    ranks = None if s.actor_num_gpus_per_node is None else s.actor_num_nodes * s.actor_num_gpus_per_node
    whys = {
        "device is cpu": s.device == "cpu",
        "train_dtype is float32": s.train_dtype == "float32",
        "attn_implementation is sdpa, whose shape is another for every micro-batch": s.attn_implementation == "sdpa",
        f"{ranks} GPUs shard each layer": ranks is not None and ranks > 1,
        "fsdp_cpu_offload brings each layer to the GPU anew": s.fsdp_cpu_offload,
        "lora_rank merges adapters in each layer": bool(s.lora_rank),
        f"{' and '.join(replays)} works in the layers' routers": bool(replays),
    }
    for why, applies in whys.items():
        if applies:
            yield Fault("torch_compile", True, why, "leave it out")
