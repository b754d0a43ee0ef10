from __future__ import annotations

import json
from typing import Any

import pytest
from config_cases import MINIMAL, faults_for

from miles.config import ConfigError, JobConfig
from miles.config.job import examine
from miles.config.rules import RULES
from miles.config.rules.registry import Rule
from miles.config.schema.catalog import catalog

GDPO = {
    "advantage_estimator": "gdpo", "gdpo_rewards": ["a", "b=0.5"], "reward_key": "a",
    "rm_type": None, "custom_rm_path": "rewards.score",
}  # fmt: skip
SGLANG = {"rollout_backend": "sglang"}
EAGLE = {"sglang_speculative_algorithm": "EAGLE", "sglang_speculative_draft_model_path": "draft"}
EAGLE3 = {"sglang_speculative_algorithm": "EAGLE3"}
TRAINED_DRAFT = {**EAGLE3, "enable_draft_training": True}
TORCH_DRAFTS = {"rollout_backend": "torch", "sglang_speculative_algorithm": "NGRAM"}
FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}
HELD_TEACHER = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": "t"}
SERVED_TEACHER = {"use_opd": True, "opd_type": "sglang", "rm_url": "http://h:1/generate"}

RULE_CASES: list[tuple[dict[str, Any], str]] = [
    (
        {"num_rollout": 0, "eval_prompt_data": ["a", "b"], "save_interval": 3},
        "save_interval = 3, but num_rollout = 0 trains nothing that could be saved; leave it out",
    ),
    (
        {"log_whole_samples": True, "log_samples_per_step": 0},
        "log_whole_samples = true, but log_samples_per_step = 0 records no samples",
    ),
    (
        {"update_weight_delta_encoding": "overwrite"},
        "update_weight_delta_encoding = overwrite, but no files are written without update_weight_disk_dir",
    ),
    (
        {"update_weight_disk_dir": "d", "update_weight_transfer_mode": "shared_memory"},
        "update_weight_disk_dir = d, but update_weight_transfer_mode = shared_memory writes no files",
    ),
    (
        {"attention_softmax_in_fp32": False, "train_backend": "megatron"},
        "attention_softmax_in_fp32 = false, but the softmax of attention is computed in float32; leave it out",
    ),
    (
        {"custom_generate_function_path": "a.b", "partial_rollout": True, "max_weight_staleness": 1},
        "partial_rollout = true, but custom_generate_function_path = a.b cannot be resumed in the middle",
    ),
    ({"loss_type": "custom_loss"}, "loss_type = custom_loss, but custom_loss_function_path is not set"),
    ({"custom_loss_function_path": "a.b"}, "custom_loss_function_path = a.b, but loss_type is policy_loss"),
    (
        {"loss_type": "custom_loss", "custom_loss_function_path": "a.b", "use_tis": True},
        "use_tis = true, but it changes the policy loss, and loss_type = custom_loss has none",
    ),
    ({"custom_tis_function_path": "a.b"}, "custom_tis_function_path = a.b, but use_tis is off"),
    (
        {"custom_tis_function_path": "a.b", "use_icepop": True},
        "use_icepop = true, but custom_tis_function_path = a.b corrects in its place",
    ),
    (
        {"custom_pg_loss_reducer_function_path": "a.b", "advantage_estimator": "dr_grpo"},
        "custom_pg_loss_reducer_function_path = a.b, but dr_grpo divides",
    ),
    (
        {"custom_reward_post_process_path": "a.b", "grpo_std_normalization": False},
        "grpo_std_normalization = false, but custom_reward_post_process_path = a.b takes the place",
    ),
    ({"custom_config_path": "a.yaml"}, "custom_config_path = a.yaml, but the command line alone reads it"),
    ({"custom_settings": {"tis_upper": 1}}, "but no setting is named tis_upper, and there is no function"),
    (
        {"rollout_function_path": "slime.rollout.sft_rollout.generate_rollout"},
        "slime.rollout.sft_rollout.generate_rollout, but there is no supervised fine-tuning",
    ),
    ({"rollout_function_path": "a.b"}, "rollout_function_path = a.b, but rollout services generate group by group"),
    ({"eval_function_path": "a.b"}, "eval_function_path = a.b, but rollout services generate group by group"),
    ({"data_source_path": "a.b"}, "data_source_path = a.b, but prompts are read from files alone"),
    (
        {"spec": ["mine.layers", "get_spec"]},
        'spec = ["mine.layers", "get_spec"], but layers are built as the model\'s config.json says',
    ),
    (
        {"use_tis": True, "tis_threshold": 0.9, "tis_clip": 2.5},
        "tis_threshold = 0.9, but tis_clip = 2.5 says otherwise; leave one of them out",
    ),
    ({"tis_threshold": 0.9}, "tis_threshold = 0.9, but it only goes with use_tis or use_icepop, without use_mis"),
    (
        {"hidden_dropout": 0.1},
        "hidden_dropout = 0.1, but nothing is dropped, so that trainer and engine compute the same",
    ),
    ({"true_on_policy_mode": True}, "true_on_policy_mode = true, but kernels of trainer and engine are not the same"),
    (
        {"recompute_logprobs_via_prefill": True},
        "recompute_logprobs_via_prefill = true, but log-probabilities are those",
    ),
    ({"bf16": True, "fp16": True}, "bf16 = true, but train_dtype = float16 says otherwise"),
    (
        {"optimizer_cpu_offload": True, "train_backend": "fsdp"},
        "optimizer_cpu_offload = true, but train_backend = fsdp does not have it; set train_backend to megatron, or "
        "set fsdp_cpu_offload instead",
    ),
    (
        {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": False},
        "use_precision_aware_optimizer = false, but optimizer_cpu_offload has Adam hold the master parameters",
    ),
    (
        {"use_precision_aware_optimizer": True, "use_distributed_optimizer": False},
        "use_distributed_optimizer = false, but use_precision_aware_optimizer is in the distributed optimizer alone",
    ),
    (
        {"use_precision_aware_optimizer": True, "train_dtype": "float32"},
        "use_precision_aware_optimizer = true, but train_dtype = float32 has no master parameters",
    ),
    (
        {"optimizer_offload_fraction": 0.5, "train_backend": "megatron"},
        "optimizer_offload_fraction = 0.5, but optimizer_cpu_offload moves all of the state, as a part left on the GPU",
    ),
    (
        {"overlap_cpu_optimizer_d2h_h2d": True, "train_backend": "megatron"},
        "overlap_cpu_optimizer_d2h_h2d = true, but it does nothing without optimizer_cpu_offload",
    ),
    (
        {"exp_avg_dtype": "bf16", "train_backend": "megatron"},
        "exp_avg_dtype = bf16, but it does nothing without use_precision_aware_optimizer",
    ),
    (
        {"exp_avg_sq_dtype": "bf16", "optimizer_cpu_offload": True},
        "exp_avg_sq_dtype = bf16, but the CPU's Adam has moments in float32 alone",
    ),
    ({"balance_data": False}, "balance_data = false, but samples are dealt over data-parallel ranks by their tokens"),
    (
        {"gradient_accumulation_fusion": True, "train_backend": "megatron"},
        "gradient_accumulation_fusion = true, but products of the backward pass are added to float32 gradients by PyT",
    ),
    (
        {"ckpt_format": "torch", "train_backend": "megatron"},
        "ckpt_format = torch, but checkpoints of the megatron backend are torch_dist, and others are not read",
    ),
    (
        {"skip_actor_forward_only": True, "num_steps_per_rollout": 2},
        "skip_actor_forward_only = true, but num_steps_per_rollout = 2 reads log-probabilities from before the first",
    ),
    (
        {"skip_actor_forward_only": True, "kl_coef": 0.1, "advantage_estimator": "ppo"},
        "skip_actor_forward_only = true, but kl_coef = 0.1 reads log-probabilities from before the first step",
    ),
    ({"save_retain_interval": 4}, "save_retain_interval = 4, but without save_interval there is one checkpoint"),
    (
        {"save_retain_interval": 4, "save_interval": 3},
        "save_retain_interval = 4, but save_interval = 3 does not divide it; make it a multiple of 3",
    ),
    (
        {**SGLANG, "offload": True, "offload_train": False},
        "offload_train = false, but offload = true asks for it; leave one of them out",
    ),
    ({"offload": True}, "offload = true, but rollout_backend = torch has no SGLang servers; set rollout_backend to"),
    (
        {"ft_components": ["rollout", "redis"]},
        "ft_components = redis, but the parts that can be named are rollout and train",
    ),
    (
        {"save_debug_rollout_data": "d/{rollout_id}_{rank}.pt"},
        "save_debug_rollout_data = d/{rollout_id}_{rank}.pt, but it may hold the placeholders {rollout_id} alone",
    ),
    (
        {"save_debug_rollout_data": "d/all.pt"},
        "save_debug_rollout_data = d/all.pt, but every rollout has a file of its own; write {rollout_id} in its name",
    ),
    (
        {"ci_save_grad_norm": "{rollout_id}.pt", "global_batch_size": 16},
        "ci_save_grad_norm = {rollout_id}.pt, but a rollout has 2 steps; write {step_id} in its name",
    ),
    (
        {"save_debug_train_data": "{rollout_id}.pt", "actor_num_gpus_per_node": 2},
        "save_debug_train_data = {rollout_id}.pt, but every rank has a file of its own; write {rank} in its name",
    ),
    ({"debug_train_only": True}, "debug_train_only = true, but without load_debug_rollout_data there is nothing"),
    (
        {"debug_train_only": False, "load_debug_rollout_data": "{rollout_id}.pt"},
        "debug_train_only = false, but load_debug_rollout_data starts no engines",
    ),
    (
        {"debug_rollout_only": True, "load_debug_rollout_data": "{rollout_id}.pt"},
        "debug_train_only = true, but debug_rollout_only has no trainer",
    ),
    (
        {"num_rollout": None, "num_epoch": 1, "load_debug_rollout_data": "{rollout_id}.pt"},
        "num_rollout is not set, and load_debug_rollout_data reads no prompts that num_epoch could count",
    ),
    (
        {"load_debug_rollout_data_subsample": 0.5},
        "load_debug_rollout_data_subsample = 0.5, but it does nothing without load_debug_rollout_data",
    ),
    ({"qkv_format": "bshd"}, "qkv_format = bshd, but train_backend = fsdp packs samples; set it to thd"),
    (
        {"qkv_format": "bshd", "context_parallel_size": 2, "actor_num_gpus_per_node": 2},
        "qkv_format = bshd, but context_parallel_size = 2 cuts packed samples; set it to thd",
    ),
    (
        {"qkv_format": "bshd", "moe_aux_loss_coeff": 0.1},
        "qkv_format = bshd, but moe_aux_loss_coeff would balance padding too; set it to thd",
    ),
    ({"lr_decay_style": "WSD"}, "lr_wsd_decay_iters is not set, and lr_decay_style = WSD needs it"),
    (
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 9, "lr_decay_iters": 10, "lr_warmup_iters": 2},
        "lr_wsd_decay_iters = 9, but lr_decay_iters = 10 leaves fewer after the warm-up; lower it",
    ),
    ({"lr_wsd_decay_style": "linear"}, "lr_wsd_decay_style = linear, but it does nothing without lr_decay_style = WSD"),
    ({"lr_wsd_decay_iters": 3}, "lr_wsd_decay_iters = 3, but it does nothing without lr_decay_style = WSD"),
    ({"chaos_interval_s": 3.0}, "chaos_interval_s = 3.0, but there is no drill without chaos"),
    (
        {**SGLANG, "rollout_external_engine_addrs": ["a:1"], "rollout_engine_python": "p"},
        "rollout_engine_python = p, but rollout_external_engine_addrs names servers that run already",
    ),
    (
        {**SGLANG, "rollout_external_engine_addrs": ["a:1"], "sglang_mem_fraction_static": 0.5},
        "sglang_mem_fraction_static = 0.5, but rollout_external_engine_addrs names servers that run already",
    ),
    (
        {**SGLANG, "rollout_external_engine_addrs": ["a:1", "a:1"]},
        "rollout_external_engine_addrs = a:1, but it is named twice",
    ),
    ({"attn_implementation": "varlen", "device": "cpu"}, "attn_implementation = varlen, but it needs CUDA and 16-bit"),
    (
        {"attn_implementation": "varlen", "train_dtype": "float32"},
        "attn_implementation = varlen, but it needs CUDA and 16-bit numbers, and train_dtype is float32",
    ),
    ({"fsdp_cpu_offload": True, "device": "cpu"}, "fsdp_cpu_offload = true, but device is cpu"),
    ({"fsdp_cpu_offload": True, "offload_train": True}, "offload_train = true, but fsdp_cpu_offload keeps all in host"),
    ({"name": "a" * 210}, "name = "),
    ({"hf_checkpoint": None}, "hf_checkpoint is not set, and a run needs a model"),
    ({"prompt_data": None}, "prompt_data is not set, and training needs prompts"),
    ({"load": "$NOWHERE/x"}, "load = $NOWHERE/x, but ~ and $NAME are expanded by a shell alone; write the whole path"),
    ({"num_rollout": None}, "num_rollout is not set, and neither is num_epoch"),
    (
        {"rollout_max_context_len": 16, "rollout_max_prompt_len": 16},
        "rollout_max_prompt_len = 16, but prompt and response share",
    ),
    (
        {"eval_min_new_tokens": 20, "eval_interval": 1, "eval_prompt_data": ["a", "b"]},
        "eval_min_new_tokens = 20, but eval_max_response_len = 16; lower it",
    ),
    ({"rollout_top_k": 0}, "rollout_top_k = 0, but no token would be left"),
    (
        {"chat_template_path": "x.jinja"},
        "chat_template_path = x.jinja, but it does nothing without apply_chat_template",
    ),
    ({"gateway_host": "0.0.0.0"}, "gateway_host = 0.0.0.0, but other machines can reach that"),
    ({"gateway": False, "gateway_port": 8000}, "gateway_port = 8000, but it does nothing without gateway"),
    ({"tls_cert": "c.pem"}, "tls_key is not set, and tls_cert is no use without its key"),
    ({"tls_mutual": True}, "tls_ca is not set, and tls_mutual must know whose certificates to accept"),
    ({"rollout_stop": [""]}, 'rollout_stop = [""], but empty text is in every response'),
    ({"label_key": None}, "label_key is not set, and rm_type = math compares responses with labels"),
    (
        {"prompt_data": None, "num_rollout": 0, "label_key": None, "eval_prompt_data": ["a", "b"]},
        "eval_label_key is not set, and rm_type = math compares responses with labels",
    ),
    ({"reward_key": "total"}, "reward_key = total, but rm_type = math gives a single number"),
    ({"eval_reward_key": "total"}, "eval_reward_key = total, but rm_type = math gives a single number"),
    ({"tool_key": "functions"}, "tool_key = functions, but it does nothing without apply_chat_template"),
    ({"group_rm": True}, "group_rm = true, but rm_type = math scores samples one by one"),
    ({"reward_service": ["h:1"]}, "reward_service = h:1, but it has no name before ="),
    ({"reward_service": ["a=h"]}, "reward_service = a=h, but it has no port: write h:9000"),
    ({"reward_service": ["a=h:0"]}, "reward_service = a=h:0, but 0 is not a port from 1 to 65535"),
    ({"reward_service": ["a=h:1", "a=h:2"]}, "reward_service = a=h:2, but a is named twice"),
    ({"reward_service": ["default=h:1"]}, "reward_service = default=h:1, but rm_type is the default already"),
    ({"num_rollout": 0}, "num_rollout = 0, but without eval_prompt_data there is nothing to do"),
    (
        {"num_rollout": 0, "eval_prompt_data": ["a", "b"], "skip_eval_before_train": True},
        "skip_eval_before_train = true, but that evaluation is all there is",
    ),
    ({"eval_interval": 1, "eval_prompt_data": ["a", "b", "c"]}, "names and files alternate and these are 3"),
    (
        {"eval_interval": 1, "eval_prompt_data": ["a", "b", "a", "c"]},
        "eval_prompt_data = a, but it names two data sets",
    ),
    ({"eval_interval": 1, "eval_prompt_data": ["a/b", "b"]}, "eval_prompt_data = a/b, but its metric is eval/NAME"),
    (
        {"over_sampling_batch_size": 3},
        "over_sampling_batch_size = 3, but a batch of rollout_batch_size = 8 would never",
    ),
    (
        {"over_sampling_batch_size": 24, "max_weight_staleness": 1},
        "rollout_batch_size × (max_weight_staleness + 1) = 16; lower it, or set max_weight_staleness to 2",
    ),
    (
        {"update_weights_interval": 3, "max_weight_staleness": 1},
        "update_weights_interval = 3, but the engines' weights get 2 steps old",
    ),
    (
        {"partial_rollout": True, "max_weight_staleness": 0},
        "partial_rollout = true, but with max_weight_staleness = 0 every response is of one version",
    ),
    ({"use_dynamic_batch_size": True}, "use_dynamic_batch_size = true, but max_tokens_per_gpu is not set"),
    ({"actor_num_nodes": 2}, "host = 127.0.0.1, but actor_num_nodes = 2 has services on other machines, and only this"),
    ({"actor_num_nodes": 2, "host": "::"}, "host = ::, but actor_num_nodes = 2 has services on other machines, and it"),
    (
        {"rollout_num_workers": 2, "rollout_workers_elsewhere": 1},
        "host = 127.0.0.1, but rollout_workers_elsewhere = 1 has services on other machines",
    ),
    (
        {"rollout_workers_elsewhere": 2, "host": "10.0.0.1"},
        "rollout_workers_elsewhere = 2, but rollout_num_workers = 1 counts those too",
    ),
    ({"trainer_master_port": 7000, "actor_num_gpus_per_node": 1}, "trainer_master_port = 7000, but one rank meets no"),
    ({"actor_num_gpus_per_node": 5}, "global_batch_size = 32, but actor_num_nodes × actor_num_gpus_per_node = 5"),
    (
        {"actor_num_gpus_per_node": 4, "micro_batch_size": 3},
        "micro_batch_size = 3, but each of 4 replicas gets 8 sample",
    ),
    (
        {"train_backend": "megatron", "gradient_checkpointing": True},
        "gradient_checkpointing = true, but train_backend = megatron does not have it; set recompute_granularity",
    ),
    (
        {"train_backend": "megatron", "torch_compile": True},
        "torch_compile = true, but train_backend = megatron does not have it; leave it out",
    ),
    ({"torch_compile": True, "device": "cpu"}, "torch_compile = true, but device is cpu; leave it out"),
    ({"torch_compile": True, "actor_num_gpus_per_node": 2}, "torch_compile = true, but 2 GPUs shard each layer"),
    ({"torch_compile": True, "lora_rank": 8}, "torch_compile = true, but lora_rank merges adapters in each layer"),
    (
        {"torch_compile": True, "attn_implementation": "sdpa"},
        "torch_compile = true, but attn_implementation is sdpa, whose shape is another for every micro-batch",
    ),
    (
        {"torch_compile": True, **FP8},
        "torch_compile = true, but compiled graphs have not been seen to round as engines do, and fp8_format = e4m3; "
        "leave one of them out",
    ),
    (
        {"torch_compile": True, "use_routing_replay": True},
        "torch_compile = true, but use_routing_replay works in the layers' routers",
    ),
    (
        {"train_backend": "fsdp", "tensor_model_parallel_size": 2},
        "tensor_model_parallel_size = 2, but train_backend = fsdp does not have it; set train_backend to megatron",
    ),
    (
        {"train_backend": "megatron", "actor_num_gpus_per_node": 4, "tensor_model_parallel_size": 3},
        "tensor_model_parallel_size × pipeline_model_parallel_size × context_parallel_size = 3, but it does not divide",
    ),
    (
        {"train_backend": "megatron", "actor_num_gpus_per_node": 4, "expert_model_parallel_size": 8},
        "expert_tensor_parallel_size × expert_model_parallel_size × pipeline_model_parallel_size = 8, but it does not",
    ),
    (
        {"train_backend": "megatron", "num_virtual_stages_per_pipeline_rank": 2},
        "num_virtual_stages_per_pipeline_rank = 2, but pipeline_model_parallel_size = 1 has no stages to cut",
    ),
    (
        {"train_backend": "megatron", "decoder_last_pipeline_num_layers": 2},
        "decoder_last_pipeline_num_layers = 2, but pipeline_model_parallel_size = 1 has no stages to cut",
    ),
    (
        {
            "train_backend": "megatron",
            "pipeline_model_parallel_size": 2,
            "actor_num_gpus_per_node": 2,
            "decoder_last_pipeline_num_layers": 2,
            "account_for_loss_in_pipeline_split": True,
        },
        "account_for_loss_in_pipeline_split = true, but decoder_last_pipeline_num_layers splits the layers in another",
    ),
    (
        {"train_backend": "megatron", "overlap_param_gather": True},
        "overlap_param_gather = true, but it works with use_distributed_optimizer and overlap_grad_reduce alone",
    ),
    (
        {
            "train_backend": "megatron",
            "moe_token_dispatcher_type": "allgather",
            "pipeline_model_parallel_size": 2,
        },
        "moe_token_dispatcher_type = allgather, but pipeline stages and expert-parallel ranks have micro-batches of",
    ),
    *(
        ({"train_backend": "megatron", **changes}, message)
        for changes, message in (
            (
                {"moe_router_load_balancing_type": "sinkhorn"},
                "moe_router_load_balancing_type = sinkhorn, but it chooses other experts than the engine",
            ),
            (
                {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01},
                "moe_router_load_balancing_type = seq_aux_loss, but samples are packed",
            ),
            (
                {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.01},
                "moe_router_load_balancing_type = none, but the type none has no loss",
            ),
            (
                {"moe_router_bias_update_rate": 0.1, "freeze_e_score_correction_bias": True},
                "freeze_e_score_correction_bias = true, but moe_router_bias_update_rate moves it",
            ),
            ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor = 1.0, but engines drop no tokens"),
            (
                {"moe_pad_expert_input_to_capacity": True},
                "moe_pad_expert_input_to_capacity = true, but experts have no capacity",
            ),
            ({"moe_input_jitter_eps": 0.1}, "moe_input_jitter_eps = 0.1, but old and new log-probabilities"),
            (
                {"moe_router_fusion": True, "use_routing_replay": True},
                "moe_router_fusion = true, but fused kernels choose experts before use_routing_replay could",
            ),
            (
                {"moe_token_dispatcher_type": "flex"},
                "moe_token_dispatcher_type = flex, but expert_tensor_parallel_size × expert_model_parallel_size = 1",
            ),
            (
                {
                    "moe_token_dispatcher_type": "flex",
                    "moe_router_dtype": "fp64",
                    "actor_num_gpus_per_node": 2,
                    "expert_model_parallel_size": 2,
                },
                "moe_router_dtype = fp64, but the kernels of flex send weights in float32",
            ),
            (
                {"moe_token_dispatcher_type": "allgather", "moe_shared_expert_overlap": True},
                "moe_shared_expert_overlap = true, but allgather leaves no time",
            ),
            (
                {"moe_enable_deepep": True},
                "moe_enable_deepep = true, but moe_token_dispatcher_type = alltoall does not use it",
            ),
            (
                {"moe_flex_dispatcher_backend": "hybridep"},
                "moe_flex_dispatcher_backend = hybridep, but moe_token_dispatcher_type = alltoall has no such kernels",
            ),
            (
                {
                    "moe_shared_expert_overlap": True,
                    "recompute_granularity": "selective",
                    "recompute_modules": ["shared_experts"],
                },
                "moe_shared_expert_overlap = true, but recompute_modules has shared_experts",
            ),
        )
    ),
    (
        {"train_backend": "megatron", "enable_mtp_training": True},
        "enable_mtp_training = true, but mtp_num_layers is not set",
    ),
    (
        {
            "train_backend": "megatron",
            "enable_mtp_training": True,
            "mtp_num_layers": 1,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 2,
        },
        "recompute_num_layers = 2, but MTP layers are recomputed one by one",
    ),
    (
        {"train_backend": "megatron", "mtp_loss_scaling_factor": 0.5},
        "mtp_loss_scaling_factor = 0.5, but it does nothing without enable_mtp_training",
    ),
    (
        {"train_backend": "megatron", "recompute_granularity": "full", "recompute_method": "uniform"},
        "recompute_num_layers is not set, and recompute_granularity = full needs it",
    ),
    (
        {"train_backend": "megatron", "recompute_modules": ["moe"]},
        "recompute_modules = moe, but it does nothing without recompute_granularity = selective",
    ),
    (
        {"train_backend": "megatron", "recompute_granularity": "selective", "recompute_modules": ["attn"]},
        "recompute_modules = attn, but it is no part of a layer; choose of core_attn, layernorm",
    ),
    (
        {
            "train_backend": "megatron",
            "recompute_granularity": "selective",
            "recompute_modules": ["moe_act"],
            "moe_grouped_gemm": False,
        },
        "recompute_modules = moe_act, but it is a part of grouped experts, and moe_grouped_gemm is off",
    ),
    (
        {"train_backend": "megatron", "cuda_graph_impl": "local"},
        "cuda_graph_impl = local, but a CUDA graph has fixed shapes, and micro-batches differ in length; leave it out",
    ),
    (
        {"train_backend": "megatron", "transformer_impl": "transformer_engine", "device": "cpu"},
        "transformer_impl = transformer_engine, but TransformerEngine needs a GPU; set it to local or auto",
    ),
    ({"target_modules": "q_proj"}, "target_modules = q_proj, but it does nothing without lora_rank"),
    ({"lora_rank": 8, "lora_dropout": 0.1}, "lora_dropout = 0.1, but the engine has no dropout"),
    (
        {"lora_rank": 8, "train_backend": "megatron", "lora_adapter_path": "a"},
        "lora_adapter_path = a, but train_backend = megatron with lora_rank does not take it: its layers have one A",
    ),
    (
        {"lora_rank": 8, "train_backend": "megatron", "target_modules": "q_proj"},
        "target_modules = q_proj, but q_proj, k_proj, v_proj are one matrix in Megatron-Core",
    ),
    (
        {
            "lora_rank": 1,
            "train_backend": "megatron",
            "tensor_model_parallel_size": 2,
            "actor_num_gpus_per_node": 2,
        },
        "lora_rank = 1, but tensor_model_parallel_size = 2 does not divide it",
    ),
    (
        {"lora_rank": 8, "train_dtype": "float32", "rollout_dtype": "bfloat16"},
        "train_dtype = float32, but adapters are merged in the type that both sides compute in, and rollout_dtype =",
    ),
    (
        {"lora_rank": 8, "fp16": True},
        "rollout_dtype = auto; make the two the same (train_dtype follows from fp16)",
    ),
    (
        {"lora_rank": 8, "use_kl_loss": True, "ref_load": "other"},
        "ref_load = other, but with lora_rank the reference is the policy without its adapter",
    ),
    (
        {**SGLANG, "lora_rank": 8, "rollout_engine_weights": "distributed", "update_weight_transfer_mode": "broadcast"},
        "rollout_engine_weights = distributed, but with lora_rank = 8 the rollout service merges adapters",
    ),
    ({"lora_rank": 8, "target_modules": "q_proj,"}, "target_modules = q_proj,, but it has an empty name"),
    ({"log_probs_chunk_size": 0}, "log_probs_chunk_size = 0, but it must be a number of rows"),
    ({"train_env_vars": {"RANK": "0"}}, 'train_env_vars = {"RANK": "[redacted]"}, but RANK is set for each rank'),
    ({"fp16": True, "train_dtype": "float32"}, "fp16 = true, but train_dtype = float32 says otherwise"),
    ({"min_lr": 1.0}, "min_lr = 1.0, but lr = 1e-06 is below it"),
    ({"lr_warmup_iters": 2, "lr_warmup_fraction": 0.1}, "lr_warmup_iters = 2, but lr_warmup_fraction = 0.1"),
    ({"lr_warmup_iters": 9, "lr_decay_iters": 9}, "lr_warmup_iters = 9, but lr_decay_iters = 9 includes the warm-up"),
    (
        {"eval_prompt_data": ["a", "b"], "eval_interval": 1, "n_samples_per_eval_prompt": 10**9},
        "n_samples_per_eval_prompt = 1000000000, but a group holds at most 65536",
    ),
    ({"rollout_batch_size": 10**12}, "samples, and a step holds at most 16777216; lower one of them"),
    ({"num_rollout": 2**60}, "but no run takes so many steps; give at most"),
    ({"save": "a\0b"}, 'save = "a\\u0000b", but it has a NUL byte'),
    ({"run_dir": "x" * 256}, "but it is too long for a path; give a path, or leave it out"),
    ({"load": ""}, "but it is empty; give one, or leave it out"),
    ({"input_key": ""}, 'input_key = "", but it is empty; give one, or leave it out'),
    ({"prompt_data": "\ud800.jsonl"}, "but it has characters that no file name has"),
    ({"use_tensorboard": True, "tb_experiment_name": "../x"}, "tb_experiment_name = ../x, but it names a folder below"),
    ({"save_hf": "hf/{rollout_id:/>9}"}, "but {rollout_id} is its only placeholder"),
    ({"save_hf": "hf/{step}"}, "save_hf = hf/{step}, but {rollout_id} is its only placeholder"),
    ({"n_samples_per_prompt": 1}, "n_samples_per_prompt = 1, but grpo compares the samples of a prompt"),
    (
        {"kl_coef": 0.1, "use_kl_loss": True, "kl_loss_coef": 0.1, "advantage_estimator": "reinforce_plus_plus"},
        "kl_coef = 0.1, but kl_loss_coef = 0.1 applies the KL a second time",
    ),
    ({"kl_coef": 0.1}, "kl_coef = 0.1, but grpo takes no KL in the reward"),
    ({"kl_loss_coef": 0.1}, "kl_loss_coef = 0.1, but it does nothing without use_kl_loss"),
    ({"ref_update_interval": 3}, "ref_update_interval = 3, but there is no reference"),
    ({"gamma": 0.9}, "gamma = 0.9, but grpo does not discount"),
    ({"partial_rollout": True, "max_weight_staleness": 0}, "partial_rollout = true, but with max_weight_staleness = 0"),
    (
        {"keep_old_actor": True, "max_weight_staleness": 1, "use_rollout_logprobs": True},
        "keep_old_actor = true, but use_rollout_logprobs already",
    ),
    (
        {"keep_old_actor": True, "max_weight_staleness": 1, "use_routing_replay": True},
        "keep_old_actor = true, but use_routing_replay replays",
    ),
    (
        {"use_routing_replay": True, "use_rollout_routing_replay": True},
        "use_routing_replay = true, but use_rollout_routing_replay replays the engine's routing already",
    ),
    (
        {"observe_rollout_routing": True, "use_rollout_routing_replay": True},
        "observe_rollout_routing = true, but use_rollout_routing_replay records and observes",
    ),
    ({"opd_kl_coef": 0.5}, "opd_kl_coef = 0.5, but it does nothing without use_opd"),
    ({"use_opd": True}, "opd_type is not set, and use_opd does not say where its teacher is"),
    ({"use_opd": True, "opd_type": "sglang"}, "rm_url is not set, and opd_type = sglang needs the server of a teacher"),
    ({"use_opd": True, "opd_type": "megatron"}, "opd_teacher_load is not set, and use_opd needs a teacher"),
    (
        {**HELD_TEACHER, "rm_url": "http://h:1/generate"},
        "rm_url = http://h:1/generate, but opd_type = megatron asks no",
    ),
    ({**SERVED_TEACHER, "opd_teacher_load": "t"}, "opd_teacher_load = t, but opd_type = sglang asks servers"),
    (
        {**SERVED_TEACHER, "opd_teacher_urls": ["a=http://h:1"]},
        "rm_url = http://h:1/generate, but opd_teacher_urls names",
    ),
    (
        {**SERVED_TEACHER, "rm_url": None, "opd_teacher_urls": ["http://h:1"]},
        "opd_teacher_urls = http://h:1, but it has no",
    ),
    (
        {**HELD_TEACHER, "opd_teacher_load": ["a=t", "a=u"]},
        "opd_teacher_load = a=u, but a is named twice",
    ),
    ({**SERVED_TEACHER, "rm_url": "h:1/generate"}, "rm_url = h:1/generate, but it is no URL of a server"),
    ({**SERVED_TEACHER, "rm_url": "http://h:none"}, "rm_url = http://h:none, but it is no URL"),
    ({**SERVED_TEACHER, "rm_url": "https://a:b@h/"}, "rm_url = https://a:[redacted]@h/, but it has a password"),
    ({**SERVED_TEACHER, "opd_teacher_key": "t"}, "opd_teacher_key = t, but there is one teacher"),
    (
        {**SERVED_TEACHER, "rollout_temperature": 0.7},
        "rollout_temperature = 0.7, but SGLang gives log-probabilities of prompts at temperature 1",
    ),
    (
        {**HELD_TEACHER, "opd_reward_weight_mode": "none"},
        "opd_reward_weight_mode = none, but opd_log_prob_top_k = 0 takes the sampled token alone",
    ),
    (
        {**HELD_TEACHER, "opd_log_prob_top_k": 4, "keep_old_actor": True, "max_weight_staleness": 1},
        "keep_old_actor = true, but old actors give the log-probability of the sampled token alone",
    ),
    ({"lambd": 0.9}, "lambd = 0.9, but advantage_estimator = grpo has no critic"),
    ({"critic_lr": 1e-5}, "critic_lr = 1e-05, but advantage_estimator = grpo has no critic"),
    ({"critic_load": "rm"}, "critic_load = rm, but advantage_estimator = grpo has no critic"),
    (
        {"advantage_estimator": "ppo", "min_lr": 1e-6, "lr": 1e-5, "critic_lr": 1e-7},
        "min_lr = 1e-06, but critic_lr = 1e-07 is below it",
    ),
    (
        {"advantage_estimator": "ppo", "lr_decay_iters": 5, "critic_lr_warmup_iters": 5},
        "critic_lr_warmup_iters = 5, but lr_decay_iters = 5 includes",
    ),
    ({"use_rollout_logprobs": True, "use_tis": True}, "use_tis = true, but use_rollout_logprobs already takes"),
    ({"use_icepop": True, "use_tis": True}, "use_icepop = true, but use_tis corrects the same gap"),
    ({"use_mis": True}, "use_mis = true, but neither use_tis nor use_rs is on"),
    ({"use_rs": True}, "use_rs = true, but it does nothing without use_mis"),
    ({"use_tis": True, "tis_clip_low": 2.0}, "tis_clip_low = 2.0, but it is not below tis_clip = 2"),
    ({"tis_clip": 3.0}, "tis_clip = 3.0, but it only goes with use_tis or use_icepop, without use_mis"),
    ({"use_tis": True, "tis_mode": "clip"}, "tis_mode = clip, but it only goes with use_mis with use_tis"),
    ({"rs_upper_bound": 5}, "rs_upper_bound = 5.0, but it only goes with use_mis with use_rs"),
    ({"tis_lower_bound": 0.1}, "tis_lower_bound = 0.1, but it only goes with use_mis with use_tis"),
    ({"opsm_delta": 0.1}, "opsm_delta = 0.1, but it does nothing without use_opsm"),
    ({"use_opsm": True}, "use_opsm = true, but in the only step of a rollout the old policy is the one being trained"),
    (
        {"use_mis": True, "use_tis": True, "tis_lower_bound": 0.1},
        "tis_lower_bound = 0.1, but tis_mode = truncate bounds weights above alone",
    ),
    (
        {"advantage_estimator": "reinforce_plus_plus", "rollout_batch_size": 1, "n_samples_per_prompt": 1},
        "rollout_batch_size = 1, but whitening compares the samples of a batch",
    ),
    ({"eps_clip": 1.0}, "eps_clip = 1.0, but it sets no lower bound, which ppo_clip needs"),
    (
        {"advantage_estimator": "cispo", "eps_clip_c": 3.0},
        "eps_clip_c = 3.0, but cispo has no dual clip",
    ),
    (
        {"advantage_estimator": "dr_grpo", "calculate_per_token_loss": True},
        "calculate_per_token_loss = true, but dr_grpo divides sums of tokens by the response limit",
    ),
    (
        {"advantage_estimator": "maxrl", "rewards_normalization": False},
        "rewards_normalization = false, but maxrl is a way to compare them",
    ),
    (
        {"advantage_estimator": "optimal_token_baseline", "keep_old_actor": True, "max_weight_staleness": 1},
        "keep_old_actor = true, but optimal_token_baseline takes the current policy's probabilities",
    ),
    ({"gdpo_rewards": ["a", "b"]}, "gdpo_rewards = a, but advantage_estimator = grpo takes one reward"),
    ({**GDPO, "gdpo_rewards": ["a"]}, "gdpo_rewards = a, but gdpo adds up several rewards"),
    ({**GDPO, "gdpo_rewards": ["a", "b=x"]}, "gdpo_rewards = b=x, but its weight is not a number; write NAME"),
    ({**GDPO, "gdpo_rewards": ["a", "b=0"]}, "gdpo_rewards = b=0, but its weight must be a finite number"),
    ({**GDPO, "gdpo_rewards": ["a", "=2"]}, "gdpo_rewards = =2, but it has no name before =; write NAME"),
    ({**GDPO, "gdpo_rewards": ["a", "b", "a=2"]}, "gdpo_rewards = a, but it is named twice"),
    ({**GDPO, "reward_key": None}, "reward_key is not set, and gdpo's rewards have several numbers"),
    ({**GDPO, "normalize_advantages": True}, "normalize_advantages = true, but gdpo normalises over the batch already"),
    (
        {"advantage_estimator": "gspo", "policy_loss_type": "sapo"},
        "policy_loss_type = sapo, but advantage_estimator = gspo names a policy loss already",
    ),
    ({"policy_loss_type": "sapo", "eps_clip_high": 0.28}, "eps_clip_high = 0.28, but sapo clips nothing"),
    ({"policy_loss_type": "dppo_tv", "eps_clip": 1.0}, "eps_clip = 1.0, but it sets no lower bound, which dppo_tv"),
    ({"policy_loss_type": "vespo", "eps_clip_c": 3.0}, "eps_clip_c = 3.0, but vespo has no dual clip; leave it out"),
    (
        {"policy_loss_type": "vespo", "sapo_tau_neg": 2.0},
        "sapo_tau_neg = 2.0, but policy_loss_type = vespo does not read it; set policy_loss_type to sapo",
    ),
    (
        {"echo_loss_coef": 0.05, "calculate_per_token_loss": True},
        "calculate_per_token_loss = true, but echo_loss_coef weighs a mean of samples' means",
    ),
    (
        {"echo_loss_coef": 0.05, "partial_rollout": True, "mask_offpolicy_in_partial_rollout": True},
        "mask_offpolicy_in_partial_rollout = true, but it masks tokens of the policy's own",
    ),
    ({"policy_loss_type": "dro"}, "dro_beta is not set, and policy_loss_type = dro has no weight"),
    (
        {"policy_loss_type": "luspo", "calculate_per_token_loss": True},
        "calculate_per_token_loss = true, but luspo weighs samples by their lengths already",
    ),
    ({"policy_loss_type": "vespo", "use_tis": True}, "use_tis = true, but vespo weighs sequences by one ratio"),
    (
        {"advantage_estimator": "dr_grpo", "normalize_advantages": True},
        "normalize_advantages = true, but dr_grpo divides by no standard deviation",
    ),
    (
        {"advantage_estimator": "ppo", "rewards_normalization": False},
        "rewards_normalization = false, but ppo takes rewards as they are",
    ),
    (
        {"advantage_estimator": "rloo", "grpo_std_normalization": False},
        "grpo_std_normalization = false, but rloo divides by no standard deviation",
    ),
    (
        {"rewards_normalization": False, "grpo_std_normalization": False},
        "grpo_std_normalization = false, but disable_rewards_normalization leaves rewards as they are",
    ),
    (
        {
            "n_samples_per_prompt": 1,
            "use_opd": True,
            "opd_type": "megatron",
            "opd_teacher_load": "t",
            "opd_kl_coef": 0,
        },
        "n_samples_per_prompt = 1, but grpo compares the samples of a prompt",
    ),
    (
        {"eval_prompt_data": ["a", "b"], "eval_interval": 1, "rollout_top_p": 0.95, "eval_top_p": 0.7},
        "rollout_top_p = 0.95, but log-probabilities are of the full",
    ),
    ({"rollout_top_k": 50}, "rollout_top_k = 50, but log-probabilities are of the full distribution"),
    ({"rollout_temperature": 1e-9}, "rollout_temperature = 1e-09, but logits divided by it lose the precision"),
    (
        {"eval_prompt_data": ["a", "b"], "eval_interval": 1, "eval_temperature": 1e-9},
        "eval_temperature = 1e-09, but logits divided by it lose the precision",
    ),
    (
        {**SGLANG, "sglang_preferred_sampling_params": {"logit_bias": {"1": 5}}},
        "sglang_preferred_sampling_params = {",
    ),
    (
        {**SGLANG, "sglang_enable_custom_logit_processor": True},
        "sglang_enable_custom_logit_processor = true, but requests name no logit processor",
    ),
    (
        {**SGLANG, "sglang_speculative_accept_threshold_acc": 0.8},
        "sglang_speculative_accept_threshold_acc = 0.8, but below 1 drafts are accepted",
    ),
    (
        {**SGLANG, "device": "cpu", "sglang_speculative_algorithm": "NGRAM"},
        "sglang_speculative_algorithm = NGRAM, but on a CPU SGLang verifies drafts greedily",
    ),
    (
        {**SGLANG, "sglang_speculative_algorithm": "NGRAM", "observe_rollout_routing": True},
        "sglang_speculative_algorithm = NGRAM, but SGLang loses the experts of tokens that it verifies so",
    ),
    (
        {**SGLANG, **EAGLE, "sglang_speculative_eagle_topk": 2, "use_rollout_routing_replay": True},
        "sglang_speculative_eagle_topk = 2, but SGLang returns experts of branches that were not accepted",
    ),
    (
        {**SGLANG, "sglang_speculative_algorithm": "NGRAM", "sglang_speculative_adaptive": True},
        "sglang_speculative_adaptive = true, but SGLang cannot change the steps of NGRAM while it runs",
    ),
    (
        {**SGLANG, **EAGLE, "sglang_speculative_adaptive": True, "sglang_enable_two_batch_overlap": True},
        "sglang_speculative_adaptive = true, but SGLang does not adapt steps with enable_two_batch_overlap",
    ),
    (
        {**SGLANG, "sglang_speculative_algorithm": "NGRAM", "sglang_speculative_use_rejection_sampling": True},
        "sglang_speculative_use_rejection_sampling = true, but SGLang has it for EAGLE, EAGLE3 and NEXTN",
    ),
    (
        {
            **(SGLANG | EAGLE),
            "sglang_speculative_use_rejection_sampling": True,
            "sglang_speculative_adaptive_config": "tiers.json",
        },
        "sglang_speculative_use_rejection_sampling = true, but SGLang's rejection sampling fails in a step without",
    ),
    (
        {**SGLANG, "sglang_speculative_algorithm": "NEXTN", "draft_responses_per_prompt": 2},
        "draft_responses_per_prompt = 2, but no engine drafts from earlier responses; set sglang_speculative_algorithm",
    ),
    ({"name": "a/b"}, "name = a/b, but the run's folder is named after it"),
    ({"host": "127.0.0.1:5000"}, "host = 127.0.0.1:5000, but it has a port: leave :5000 out"),
    ({"gateway_host": "http://localhost"}, "gateway_host = http://localhost, but it begins with http://"),
    ({"redis_url": "redis://h:x"}, "redis_url = redis://h:x, but x is not a port from 1 to 65535"),
    ({"redis_url": "localhost:6379"}, "redis_url = localhost:6379, but it must begin with redis://"),
    ({"controller_port": 99, "reward_port": 99}, "reward_port = 99, but controller_port is the same"),
    (
        {"controller_port": 99, "rollout_port": 98, "rollout_num_workers": 2},
        "controller_port = 99, but rollout services",
    ),
    ({"rollout_port": 65535, "rollout_num_workers": 2}, "rollout_port = 65535, but rollout_num_workers = 2 services"),
    ({"device": "cpu", "distributed_backend": "nccl"}, "distributed_backend = nccl, but device = cpu"),
    ({"dynamic_sampling_filter_path": "f"}, "dynamic_sampling_filter_path = f, but it must name a module and"),
    (
        {"rollout_backend": "torch", "sglang_mem_fraction_static": 0.8},
        "sglang_mem_fraction_static = 0.8, but rollout_backend = torch has no SGLang servers; set rollout_backend to",
    ),
    (
        {**TORCH_DRAFTS, "sglang_speculative_attention_mode": "decode"},
        "sglang_speculative_attention_mode = decode, but rollout_backend = torch verifies drafts in one way, without",
    ),
    (
        {"rollout_backend": "torch", "sglang_speculative_num_steps": 3},
        "sglang_speculative_num_steps = 3, but there are no drafts without sglang_speculative_algorithm; set it, or",
    ),
    (
        {"rollout_backend": "torch", "sglang_speculative_algorithm": "NEXTN"},
        "sglang_speculative_algorithm = NEXTN, but rollout_backend = torch has no such drafts; choose one of EAGLE3, "
        "NGRAM, STANDALONE, or set rollout_backend to sglang",
    ),
    (
        {**TORCH_DRAFTS, "sglang_speculative_num_steps": 0},
        "sglang_speculative_num_steps = 0, but it must be a count from 1 on",
    ),
    (
        {**TORCH_DRAFTS, "sglang_speculative_eagle_topk": 4},
        "sglang_speculative_eagle_topk = 4, but rollout_backend = torch verifies trees of one branch; set it to 1",
    ),
    (
        {**TORCH_DRAFTS, "sglang_speculative_num_steps": 4, "sglang_speculative_num_draft_tokens": 8},
        "sglang_speculative_num_draft_tokens = 8, but of num_steps = 4 drafts and the last token there are 5; leave it",
    ),
    (
        {**TORCH_DRAFTS, "sglang_speculative_draft_model_path": "x"},
        "sglang_speculative_draft_model_path = x, but drafts of NGRAM come from text, without a model; leave it out",
    ),
    (
        {**TORCH_DRAFTS, "sglang_speculative_algorithm": "standalone"},
        "sglang_speculative_algorithm = standalone drafts with a small model; set it to its folder",
    ),
    (
        {"rollout_backend": "torch", "rollout_num_gpus": 2},
        "rollout_num_gpus = 2, but rollout_backend = torch has no SGLang servers",
    ),
    (
        {"colocate": True, "rollout_backend": "torch"},
        "colocate = true, but rollout_backend = torch has no SGLang servers, and no other engine",
    ),
    (
        {**SGLANG, "sglang_dp_size": 2},
        "sglang_dp_size = 2, but SGLang takes new weights into one copy of the model alone; set rollout_num_gpus",
    ),
    (
        {**SGLANG, "rollout_num_gpus": 3, "rollout_num_gpus_per_engine": 2},
        "rollout_num_gpus = 3, but rollout_num_gpus_per_engine × rollout_num_workers = 2 does not divide it; set it to",
    ),
    (
        {**SGLANG, "rollout_external_engine_addrs": ["http://a:1"]},
        "rollout_external_engine_addrs = http://a:1, but it begins with http://: leave that out",
    ),
    (
        {**SGLANG, "rollout_external_engine_addrs": ["a:1"], "rollout_num_workers": 2},
        "rollout_external_engine_addrs = 1, but rollout_num_workers = 2 services need one each",
    ),
    (
        {**SGLANG, "rollout_engine_weights_dir": "x"},
        "rollout_engine_weights_dir = x, but it does nothing without rollout_engine_weights = disk",
    ),
    (
        {**SGLANG, "rollout_engine_weights": "distributed"},
        "rollout_engine_weights = distributed, but update_weight_transfer_mode = auto brings weights to the rollout",
    ),
    (
        {
            **SGLANG,
            "rollout_engine_weights": "distributed",
            "update_weight_transfer_mode": "broadcast",
            "colocate": True,
        },
        "rollout_engine_weights = distributed, but NCCL connects no two processes on one GPU",
    ),
    (
        {**SGLANG, "colocate": True, "max_weight_staleness": 1},
        "colocate = true, but max_weight_staleness = 1 has engines and trainer work at once",
    ),
    (
        {**SGLANG, "offload_train": True, "partial_rollout": True, "max_weight_staleness": 2},
        "offload_train = true, but max_weight_staleness = 2 has engines and trainer work at once",
    ),
    (
        {"fp8_format": "e4m3"},
        "fp8_recipe is not set, and fp8_format = e4m3 needs it: Megatron's default, delayed, has scales of earlier "
        "steps, which no engine has; set it to blockwise",
    ),
    ({"fp8_recipe": "mxfp8"}, "fp8_recipe = mxfp8, but it does nothing without fp8_format"),
    ({"fp4_recipe": "nvfp4"}, "fp4_recipe = nvfp4, but it does nothing without fp4_format"),
    (
        {**FP8, "fp8_block_scales": "power_of_two", "train_env_vars": {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}},
        "fp8_block_scales = power_of_two, but NVTE_FP8_BLOCK_SCALING_FP32_SCALES = 1 in train_env_vars says otherwise; "
        "leave NVTE_FP8_BLOCK_SCALING_FP32_SCALES out",
    ),
    (
        {"int4_qat": False, "train_env_vars": {"OPEN_TRAINING_INT4_FAKE_QAT_FLAG": "1"}},
        "int4_qat = false, but OPEN_TRAINING_INT4_FAKE_QAT_FLAG = 1 in train_env_vars says otherwise",
    ),
    ({**FP8, "int4_qat": True}, "int4_qat = true, but fp8_format = e4m3 gives the trainer another format"),
    ({**FP8, "fp4_format": "e2m1"}, "fp4_format = e2m1, but fp8_format = e4m3 gives the trainer another format"),
    (
        {**FP8, "rollout_weight_format": "int4"},
        "rollout_weight_format = int4, but fp8_format = e4m3 has the trainer compute in fp8_block, which is another "
        "function; leave it out: engines get the trainer's format",
    ),
    (
        {"int4_qat": True, "rollout_weight_format": "as_trained"},
        "rollout_weight_format = as_trained, but int4_qat = true trains weights that are rounded, and engines would",
    ),
    (
        {**SGLANG, "rollout_weight_format": "mxfp8"},
        "rollout_weight_format = mxfp8, but rollout_backend = sglang does not take it; set rollout_backend to torch",
    ),
    (
        {**SGLANG, "fp4_format": "e2m1"},
        "fp4_format = e2m1, but rollout_backend = sglang does not take nvfp4; set rollout_backend to torch",
    ),
    (
        {"lora_rank": 4, "rollout_weight_format": "fp8_block"},
        "rollout_weight_format = fp8_block, but lora_rank = 4 sends adapters",
    ),
    ({"lora_rank": 4, "int4_qat": True}, "int4_qat = true, but lora_rank = 4 sends adapters"),
    (
        {"lora_rank": 4, **FP8, "rollout_weight_format": "as_trained"},
        "fp8_format = e4m3, but fp8_block is of the sum of base and adapter, which lora_rank = 4 keeps apart",
    ),
    (
        {**FP8, "train_dtype": "float16"},
        "fp8_format = e4m3, but scales of fp8_block need the range of bfloat16, and train_dtype = float16",
    ),
    (
        {"int4_qat": True, "train_dtype": "bfloat16", "rollout_dtype": "float32"},
        "rollout_dtype = float32, but int4_qat = true rounds the weights of trainer and engines alike in one type, and "
        "train_dtype = bfloat16; make the two the same",
    ),
    (
        {"low_precision_impl": "emulated"},
        "low_precision_impl = emulated, but it does nothing without a format of the trainer",
    ),
    (
        {**FP8, "low_precision_impl": "transformer_engine", "train_backend": "fsdp"},
        "low_precision_impl = transformer_engine, but train_backend = fsdp has no layers of TransformerEngine",
    ),
    (
        {"int4_qat": True, "low_precision_impl": "transformer_engine", "train_backend": "megatron"},
        "low_precision_impl = transformer_engine, but TransformerEngine does not round to int4 as engines do",
    ),
    (
        {**FP8, "low_precision_impl": "transformer_engine", "train_backend": "megatron", "device": "cpu"},
        "low_precision_impl = transformer_engine, but TransformerEngine computes on GPUs alone, and device is cpu",
    ),
    (
        {
            **FP8,
            "low_precision_impl": "transformer_engine",
            "train_backend": "megatron",
            "device": "cuda",
            "rollout_dtype": "float32",
        },
        "low_precision_impl = transformer_engine, but TransformerEngine's kernels go with train_dtype = bfloat16",
    ),
    (
        {**FP8, "low_precision_impl": "transformer_engine", "train_backend": "megatron", "transformer_impl": "local"},
        "low_precision_impl = transformer_engine, but transformer_impl = local has layers without TransformerEngine",
    ),
    (
        {**FP8, "fp8_format": "hybrid", "train_backend": "fsdp"},
        "fp8_format = hybrid, but its e5m2 is of gradients, which emulation computes in train_dtype, and train_backend",
    ),
    (
        {**FP8, "num_layers_at_start_in_bf16": 2},
        "num_layers_at_start_in_bf16 = 2, but it does nothing without first_last_layers_bf16",
    ),
    (
        {"rollout_weight_format": "as_trained", "extra_high_precision_layers_hf": ["q"]},
        'extra_high_precision_layers_hf = ["q"], but it does nothing without a format: fp8_format, fp4_format,',
    ),
    (
        {"rollout_weight_format": "as_trained", "precision_metrics_interval": 5},
        "precision_metrics_interval = 5, but it does nothing without a format: fp8_format, fp4_format,",
    ),
    (
        {"rollout_weight_format": "fp8_block", "int4_layers": ["."]},
        'int4_layers = ["."], but neither trainer nor engines compute in int4; set int4_qat or rollout_weight_format',
    ),
    (
        {"rollout_weight_format": "int4", "fp8_block_scales": "power_of_two"},
        "fp8_block_scales = power_of_two, but neither trainer nor engines compute in fp8_block; set fp8_format or",
    ),
    (
        {**FP8, "te_precision_config_file": "base64:%"},
        "te_precision_config_file = base64:%, but what follows base64: is not base64; name what to keep in",
    ),
    (
        {**SGLANG, "rollout_weight_format": "as_trained", "sglang_quantization": "fp8"},
        "sglang_quantization = fp8, but weights are published in rollout_dtype, and a server that quantises them by "
        "itself takes no updates; set rollout_weight_format to fp8_block",
    ),
    (
        {**SGLANG, "sglang_quantize_and_serve": True},
        "sglang_quantize_and_serve = true, but a server would quantise weights by itself, and updates bring others",
    ),
    ({"wandb_mode": "offline"}, "wandb_mode = offline, but it does nothing without use_wandb"),
    ({"mlflow_run_name": "x"}, "mlflow_run_name = x, but it does nothing without use_mlflow"),
    ({"tb_experiment_name": "x"}, "tb_experiment_name = x, but it does nothing without use_tensorboard"),
    (
        {"update_weight_transfer_mode": "disk_delta"},
        "update_weight_transfer_mode = disk_delta, but update_weight_disk_dir is not set",
    ),
    (
        {"update_weight_transfer_mode": "cuda_ipc", "device": "cpu"},
        "update_weight_transfer_mode = cuda_ipc, but device is cpu",
    ),
    (
        {"enable_draft_training": True},
        "enable_draft_training = true, but engines draft nothing; set sglang_speculative",
    ),
    (
        {"enable_draft_training": True, "sglang_speculative_algorithm": "NEXTN"},
        "NEXTN: the draft is made of the policy's own MTP layers; leave it out, and set enable_mtp_training",
    ),
    (
        {**TRAINED_DRAFT, "sglang_speculative_algorithm": "EAGLE", "sglang_speculative_draft_model_path": "head"},
        "sglang_speculative_algorithm = EAGLE: heads of EAGLE-1 and -2 predict hidden states",
    ),
    (
        {"enable_draft_training": True, "sglang_speculative_algorithm": "NGRAM"},
        "NGRAM drafts from earlier responses, without a model; leave it out",
    ),
    ({**TRAINED_DRAFT, "sglang_speculative_algorithm": "DFLASH"}, "DFLASH: nothing here knows that draft's model; set"),
    (
        {**TRAINED_DRAFT, "debug_rollout_only": True},
        "debug_rollout_only has no trainer to record; leave one of them out",
    ),
    (
        {**TRAINED_DRAFT, "num_rollout": 0, "eval_prompt_data": ["a", "b"]},
        "enable_draft_training = true, but num_rollout = 0 trains nothing to learn from; leave it out",
    ),
    (
        {**SGLANG, "enable_draft_training": True, "rollout_external_engine_addrs": ["h:1"]},
        "enable_draft_training = true, but servers of rollout_external_engine_addrs run already",
    ),
    (EAGLE3, "EAGLE3 drafts with a head that was trained for the policy; set it to the folder of a head, or enable"),
    (
        {"sglang_speculative_algorithm": "STANDALONE", "enable_draft_training": True},
        "sglang_speculative_algorithm = STANDALONE drafts with a small model; set it to its folder",
    ),
    ({"draft_learning_rate": 1e-3}, "draft_learning_rate = 0.001, but it does nothing without enable_draft_training"),
    (
        {"draft_unroll_steps": 7},
        "draft_unroll_steps = 7, but it does nothing without enable_draft_training; turn that on",
    ),
    (
        {
            "sglang_speculative_algorithm": "STANDALONE",
            "sglang_speculative_draft_model_path": "small",
            "enable_draft_training": True,
            "draft_unroll_steps": 7,
        },
        "draft_unroll_steps = 7, but a standalone draft reads tokens, and is not trained on what it has drafted itself",
    ),
    (
        {**TRAINED_DRAFT, "draft_tokens_per_step": 100},
        "draft_batch_tokens = 8192, but a recording has draft_tokens_per_step = 100 tokens; lower it",
    ),
    ({**TRAINED_DRAFT, "draft_train_device": "gpu"}, "draft_train_device = gpu, but it names no device; set it to cpu"),
    (
        {
            **(TRAINED_DRAFT | TORCH_DRAFTS),
            "sglang_speculative_algorithm": "STANDALONE",
            "sglang_speculative_draft_model_path": "d",
            "draft_train_device": "cuda:1",
            "device": "cpu",
        },
        "draft_train_device = cuda:1, but device is cpu",
    ),
    (
        {"draft_acceptance_alarm": 1.5},
        "draft_acceptance_alarm = 1.5, but engines draft nothing; set sglang_speculative",
    ),
]


def test_the_minimal_configuration_is_valid() -> None:
    assert faults_for() == []


@pytest.mark.parametrize(("changes", "expected"), RULE_CASES, ids=[expected[:50] for _, expected in RULE_CASES])
def test_a_rule_finds_its_fault(changes: dict[str, Any], expected: str) -> None:
    faults = faults_for(**changes)
    assert len(faults) == 1
    assert expected in faults[0]
    assert "; " in faults[0], "a remedy is named"


ALLOWED: dict[str, dict[str, Any]] = {
    "cispo without a lower bound": {"advantage_estimator": "cispo", "eps_clip": 1.0, "eps_clip_high": 4.0},
    "cispo with a bound far below 0": {"advantage_estimator": "cispo", "eps_clip": 1000},
    "gspo's narrow clipping": {"advantage_estimator": "gspo", "eps_clip": 3e-4, "eps_clip_high": 4e-4},
    "several rewards with weights": GDPO,
    "several centred rewards": {**GDPO, "grpo_std_normalization": False},
    "a wide bound of log ratios": {"policy_loss_type": "gmpo", "eps_clip": 1.2},
    "a loss beside its estimator's name": {"advantage_estimator": "rloo", "policy_loss_type": "gspo"},
    "an estimator's own loss": {"advantage_estimator": "cispo", "policy_loss_type": "cispo"},
    "sequences weighed from the engine on": {"policy_loss_type": "vespo", "use_rollout_logprobs": True},
    "a soft penalty": {"policy_loss_type": "dro", "dro_beta": 0.05},
    "clip higher": {"eps_clip": 0.2, "eps_clip_high": 0.28, "calculate_per_token_loss": True},
    "group mean and batch standard deviation": {"grpo_std_normalization": False, "normalize_advantages": True},
    "importance sampling without an upper bound": {"use_tis": True, "tis_clip": 1e9},
    "rejection without a lower bound": {"use_mis": True, "use_rs": True, "rs_lower_bound": 0, "rs_upper_bound": 5},
    "weights without a lower bound": {"use_mis": True, "use_tis": True, "tis_mode": "mask", "tis_lower_bound": 0},
    "rejection by the bound of weights": {
        "use_mis": True,
        "use_tis": True,
        "use_rs": True,
        "tis_lower_bound": 0.1,
    },
    "masking of every sequence that moved": {"use_opsm": True, "opsm_delta": 0, "num_steps_per_rollout": 2},
    "rloo of two": {"advantage_estimator": "rloo", "n_samples_per_prompt": 2},
    "a single sample of a teacher's student": {
        "n_samples_per_prompt": 1,
        "use_opd": True,
        "opd_type": "megatron",
        "opd_teacher_load": "t",
    },
    "a single sample as it is scored": {"n_samples_per_prompt": 1, "rewards_normalization": False},
    "evaluation from a nucleus": {
        "eval_prompt_data": ["a", "b"],
        "eval_interval": 1,
        "eval_top_p": 0.7,
        "eval_top_k": 20,
        "eval_temperature": 0,
    },
    "nothing but evaluation, from a nucleus": {
        "num_rollout": 0,
        "eval_prompt_data": ["a", "b"],
        "rollout_top_p": 0.7,
        "rollout_top_k": 20,
    },
    "bfloat16 training with FP8 rollouts": {**SGLANG, "rollout_weight_format": "fp8_block"},
    "FP8 training with bfloat16 rollouts": {**FP8, "rollout_weight_format": "as_trained"},
    "FP8 training and rollouts": {**SGLANG, **FP8, "rollout_weight_format": "fp8_block"},
    "gradients in e5m2": {**FP8, "fp8_format": "hybrid", "train_backend": "megatron", "device": "cuda"},
    "INT4 as trained": {**SGLANG, "int4_qat": True, "int4_group_size": 32, "int4_layers": ["."]},
    "a file of precision by its content": {**FP8, "te_precision_config_file": "base64:" + "CgoK" * 2000 + "e30="},
    "FP4 on coming GPUs, emulated": {"fp4_format": "e2m1", "first_last_layers_bf16": True},
    "routing of chains of drafts": {
        **(SGLANG | EAGLE),
        "observe_rollout_routing": True,
        "sglang_speculative_adaptive": True,
    },
    "a head that begins from nothing": TRAINED_DRAFT,
    "a head trained by what was sampled": {**TRAINED_DRAFT, "draft_loss": "ce", "draft_unroll_steps": 2},
    "drafts from text in the torch engine": {
        **TORCH_DRAFTS,
        "sglang_speculative_num_steps": 6,
        "sglang_speculative_num_draft_tokens": "7",
        "sglang_speculative_eagle_topk": 1,
        "sglang_speculative_adaptive": False,
    },
    "a draft model of the torch engine": {
        **TORCH_DRAFTS,
        "sglang_speculative_algorithm": "EAGLE3",
        "sglang_speculative_draft_model_path": "x",
    },
    "speculative decoding that keeps the distribution": {**SGLANG, "sglang_speculative_accept_threshold_acc": 1.0},
    "earlier responses as drafts": {**SGLANG, "sglang_speculative_algorithm": "NGRAM", "draft_responses_per_prompt": 2},
}


@pytest.mark.parametrize("changes", ALLOWED.values(), ids=ALLOWED)
def test_what_papers_and_evaluations_need_can_be_set(changes: dict[str, Any]) -> None:
    assert faults_for(**changes) == []


@pytest.mark.parametrize("name", ["model-path", "model", "enable_memory", "nccl_init"])
def test_sglangs_other_spellings_of_a_refused_flag_are_refused_too(name: str) -> None:
    (fault,) = faults_for(**SGLANG, **{f"sglang_{name}": "1"})
    assert fault.startswith(f"sglang_{name} = 1, but")


def test_a_run_of_epochs_trains_and_so_samples_from_the_full_distribution() -> None:
    (fault,) = faults_for(num_rollout=None, num_epoch=1, rollout_top_p=0.9)
    assert fault.startswith("rollout_top_p = 0.9")


def test_every_rule_has_a_case() -> None:
    settings = [examine(MINIMAL | changes).settings for changes, _ in RULE_CASES]

    def fires(rule: Rule) -> bool:
        return any(list(rule(each)) for each in settings)

    assert [rule.__name__ for rule in RULES if not fires(rule)] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"fp8_format": "e4m3", "fp8_recipe": "delayed"},
            "fp8_recipe = delayed, but its scales are of earlier steps, and engines have none of them; set it to "
            "blockwise",
        ),
        ({"lr": "fast"}, "lr = fast, but it must be a number; give one"),
        ({"lr": True}, "lr = true, but it must be a number, not a switch; correct it"),
        ({"lr": float("nan")}, "lr = NaN, but it must be a finite number; give one"),
        ({"lr": -1}, "lr = -1, but it must be at least 0; raise it"),
        ({"num_rollout": 1.5}, "num_rollout = 1.5, but it must be a whole number; give one"),
        ({"rollout_temperature": 0}, "rollout_temperature = 0, but it must be above 0; raise it"),
        ({"rollout_top_p": 1.5}, "rollout_top_p = 1.5, but it must be at most 1; lower it"),
        ({"eps_clip": -0.1}, "eps_clip = -0.1, but it must be at least 0; raise it"),
        ({"controller_port": 70000}, "controller_port = 70000, but it must be at most 65535; lower it"),
        ({"use_tis": "maybe"}, "use_tis = maybe, but it must be true or false; give one of them"),
        ({"name": 7}, "name = 7, but it must be text; put it in quotes"),
        ({"rollout_stop": {"a": 1}}, 'rollout_stop = {"a": 1}, but it must be a list; give a list'),
        ({"rollout_stop_token_ids": ["x"]}, "rollout_stop_token_ids = x, but it must be a whole number; give one"),
        (
            {"train_env_vars": "[1]"},
            'train_env_vars = [1], but it must be an object; give one, e.g. {"key": "value"}',
        ),
        (
            {"kl_loss_type": "k3_low_var"},
            "kl_loss_type = k3_low_var, but it must be one of k1, k2, k3, low_var_kl; choose one of them",
        ),
        (
            {"train_backend": "megatronn"},
            "train_backend = megatronn, but it must be one of auto, fsdp, megatron; did you mean megatron?",
        ),
        (
            {"rollout_batchsize": 3},
            "rollout_batchsize = 3, but there is no such setting; did you mean rollout_batch_size?",
        ),
        (
            {"use_dynamic": True},
            "use_dynamic = true, but there is no such setting; did you mean use_dynamic_batch_size?",
        ),
        ({"qqq": 1}, "qqq = 1, but there is no such setting; `miles config docs` lists them all"),
        ({"sglang_": 1}, "sglang_ = 1, but there is no such setting; `miles config docs` lists them all"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in faults_for(**changes)


def test_malformed_json_is_refused_with_its_place() -> None:
    (fault,) = faults_for(train_env_vars="{'A': 1}")
    assert fault.startswith("train_env_vars = {'A': 1}, but it is not JSON (Expecting property name")


def test_ten_faults_are_all_listed_at_once() -> None:
    wrong = {
        "hf_checkpoint": None,
        "learning_rate": 1,
        "rollout_top_p": 2,
        "advantage_estimator": "gpro",
        "global_batch_size": 5,
        "kl_loss_coef": 1.0,
        "use_dynamic_batch_size": True,
        "reward_service": ["nowhere"],
        "controller_port": -1,
        "dynamic_sampling_filter_path": "f",
        "num_rollout": "many",
    }
    with pytest.raises(ConfigError) as error:
        JobConfig.from_flat(MINIMAL | wrong)
    fields = {fault.field for fault in error.value.faults}
    assert fields >= (set(wrong) - {"global_batch_size"}) | {"rollout_batch_size × n_samples_per_prompt"}
    lines = str(error.value).splitlines()
    assert lines[0] == f"{len(error.value.faults)} faults in the configuration:"
    assert len(lines) == 1 + len(error.value.faults)
    assert all(fault.problem and fault.remedy for fault in error.value.faults)
    assert json.loads(json.dumps([fault.to_json() for fault in error.value.faults]))[0].keys() == {
        "field",
        "value",
        "problem",
        "remedy",
        "message",
    }


def test_a_faulty_setting_does_not_set_off_the_rules_that_read_it() -> None:
    assert faults_for(rollout_batch_size="x") == ["rollout_batch_size = x, but it must be a whole number; give one"]
    assert faults_for(hf_checkpoint=3) == ["hf_checkpoint = 3, but it must be text; put it in quotes"]


def test_none_means_not_given() -> None:
    everything = dict.fromkeys(catalog(), None) | MINIMAL
    assert JobConfig.from_flat(everything) == JobConfig.from_flat(MINIMAL)


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = JobConfig.from_flat(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0  # type: ignore[misc]
    assert config.replace(lr=1.0).optimizer.lr == 1.0
    with pytest.raises(ConfigError, match="lr = -1"):
        config.replace(lr=-1)


def test_settings_that_are_not_given_follow_others() -> None:
    config = JobConfig.from_flat(
        MINIMAL
        | {"rollout_temperature": 0.5, "label_key": "answer", "eps_clip": 0.1, "use_kl_loss": True, "name": "try-1"}
    )
    assert config.eval.eval_temperature == 0.5
    assert config.eval.eval_label_key == "answer"
    assert config.eval.eval_max_response_len == 16
    assert config.algorithm.eps_clip_high == 0.1
    assert config.checkpoint.ref_load == "model"
    assert config.services.run_dir == "runs/try-1"
    assert config.algorithm.tis_lower_bound == 0.5
    assert JobConfig.from_flat(MINIMAL | {"eps_clip_high": 0.3}).algorithm.eps_clip_high == 0.3


def test_rollouts_come_from_epochs_when_they_are_not_given() -> None:
    config = JobConfig.from_flat(MINIMAL | {"num_rollout": None, "num_epoch": 3})
    assert config.rollouts(dataset_size=20) == 7
    assert JobConfig.from_flat(MINIMAL).rollouts(dataset_size=20) == 10


def test_the_device_decides_ranks_and_backend_unless_they_are_given() -> None:
    config = JobConfig.from_flat(MINIMAL)
    with pytest.raises(ValueError, match="resolve"):
        _ = config.cluster.trainer_world_size
    assert config.resolve("cpu").cluster.trainer_world_size == 1
    assert config.resolve("cpu").cluster.distributed_backend == "gloo"
    assert config.resolve("cuda").cluster.trainer_world_size == 8
    assert config.resolve("cuda").cluster.distributed_backend == "nccl"
    given = config.replace(actor_num_gpus_per_node=2, distributed_backend="gloo", device="cuda").resolve("cpu")
    assert (given.cluster.trainer_world_size, given.cluster.distributed_backend) == (2, "gloo")
    with pytest.raises(ConfigError, match="actor_num_nodes × actor_num_gpus_per_node = 8 does not divide it"):
        config.replace(rollout_batch_size=9, global_batch_size=36, num_steps_per_rollout=1).resolve("cuda")


def test_tensorboard_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_DIR", "/boards")
    config = JobConfig.from_flat(MINIMAL | {"use_tensorboard": True})
    assert config.telemetry.tb_project_name is None
    assert config.resolve("cpu").telemetry.tb_project_name == "/boards"
    assert config.replace(tb_project_name="mine").resolve("cpu").telemetry.tb_project_name == "mine"
    assert config.replace(use_tensorboard=False).resolve("cpu").telemetry.tb_project_name is None


@pytest.mark.parametrize("key", sorted(catalog()))
def test_any_one_faulty_setting_is_all_that_is_reported(key: str) -> None:
    """Also where the machine is known, so that rules on ranks and batches run."""
    resolved = MINIMAL | {"device": "cpu", "actor_num_gpus_per_node": 2}
    faults = examine(resolved | {key: object()}).faults
    assert key in [fault.field for fault in faults]
