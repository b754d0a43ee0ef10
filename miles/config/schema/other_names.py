"""What settings are called elsewhere: names of TRL, verl, OpenRLHF and transformers that mean one of ours."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES: Mapping[str, str] = {
    "hf_checkpoint": "model model_path model_name_or_path pretrain base_model",
    "prompt_data": "dataset dataset_path train_files train_data",
    "eval_prompt_data": "val_files eval_dataset validation_data",
    "run_dir": "output_dir default_local_dir",
    "load": "resume_from_checkpoint load_path resume_from",
    "num_epoch": "num_epochs num_train_epochs total_epochs epochs",
    "num_rollout": "max_steps total_training_steps num_iterations",
    "rollout_batch_size": "train_batch_size prompts_per_step",
    "global_batch_size": "ppo_mini_batch_size mini_batch_size",
    "n_samples_per_prompt": "num_generations group_size rollout_n num_samples_per_prompt samples_per_prompt",
    "max_tokens_per_gpu": "ppo_max_token_len_per_gpu max_token_len_per_gpu",
    "rollout_max_response_len": "max_completion_length max_response_length max_new_tokens generate_max_len",
    "rollout_max_prompt_len": "max_prompt_length prompt_max_len",
    "rollout_max_context_len": "max_model_len max_context_len max_context_length",
    "rollout_temperature": "temperature",
    "rollout_top_p": "top_p",
    "rollout_top_k": "top_k",
    "lr": "learning_rate actor_learning_rate actor_lr",
    "critic_lr": "critic_learning_rate",
    "clip_grad": "max_grad_norm grad_clip gradient_clipping",
    "lr_warmup_iters": "warmup_steps lr_warmup_steps num_warmup_steps",
    "lr_decay_style": "lr_scheduler_type",
    "eps_clip": "epsilon clip_ratio clip_range",
    "eps_clip_high": "epsilon_high clip_ratio_high",
    "kl_loss_coef": "beta kl_beta",
    "kl_coef": "init_kl_coef",
    "entropy_coef": "entropy_coeff ent_coef",
    "lambd": "gae_lambda lam",
    "advantage_estimator": "adv_estimator",
    "save_interval": "save_freq save_steps",
    "eval_interval": "test_freq eval_steps eval_freq",
    "tensor_model_parallel_size": "tensor_parallel_size tp_size tp",
    "pipeline_model_parallel_size": "pipeline_parallel_size pp_size pp",
    "context_parallel_size": "cp_size cp ulysses_sequence_parallel_size",
    "expert_model_parallel_size": "expert_parallel_size ep_size ep",
    "use_dynamic_batch_size": "use_dynamic_bsz",
    "lora_rank": "lora_r",
    "rollout_num_gpus_per_engine": "vllm_tensor_parallel_size rollout_tp",
    "sglang_mem_fraction_static": "gpu_memory_utilization vllm_gpu_memory_utilization mem_fraction_static",
    "max_weight_staleness": "max_staleness max_off_policy_steps staleness off_policy_steps fully_async",
}
"""The other names of a setting, by its key."""

_SETTINGS = {name: key for key, names in _NAMES.items() for name in names.split()}


def setting_of(name: str) -> str | None:
    """Return the key of the setting that is called `name` elsewhere, or None. Dashes are underscores."""
    return _SETTINGS.get(name.lstrip("-").replace("-", "_").lower())


def other_names() -> Mapping[str, str]:
    """Return all other names, each with the key of the setting."""
    return _SETTINGS
