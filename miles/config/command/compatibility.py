"""Flags whose defaults or choices differ from those of slime and miles recipes."""

from __future__ import annotations

from collections.abc import Mapping

DIFFERENT_DEFAULTS: Mapping[str, str] = {
    "train_backend": "auto instead of megatron, which is megatron where it is installed or asked for",
    "n_samples_per_prompt": "8 instead of 1 where an estimator compares them and one would give no gradient",
    "attn_implementation": "auto instead of flash_attention_2, which not every machine has",
    "wandb_project": "none, also where fsdp alone had miles-fsdp",
    "lr": "1e-6 for every backend, also where fsdp alone had 2e-5",
    "actor_num_gpus_per_node": "8 on CUDA as elsewhere, but 1 on CPU",
    "num_gpus_per_node": "those that the trainer leaves instead of 8",
    "distributed_backend": "nccl on CUDA as elsewhere, but gloo on CPU",
    "update_weight_transfer_mode": "auto instead of broadcast",
    "eps_clip": "0.2 as elsewhere for the losses found there, and the papers' values for others",
    "rollout_health_check_interval": "1 second instead of 30: a probe also tells how much a server has to do",
    "tis_lower_bound": "1 / tis_upper_bound, which is 0.5 as elsewhere until tis_upper_bound changes",
    "data_source_path": "not given, which means the same",
    "lr_wsd_decay_style": "exponential, as Megatron-LM has it, also where fsdp alone had none",
    "use_rs": "off until asked for, and a flag instead of a key in a file of its own",
}
"""How the default differs, by key."""

DIFFERENT_CHOICES: Mapping[str, str] = {
    "fp8_recipe": "blockwise and mxfp8, whose scales engines have too",
    "fp4_recipe": "nvfp4",
    "ft_components": "rollout and train, which change nothing",
    "attn_implementation": "auto, varlen, sdpa, flash_attention_2 and flash_attention_3",
    "train_backend": "auto besides",
    "distributed_backend": "nccl and gloo",
    "advantage_estimator": "rloo, dr_grpo, cispo, maxrl, gdpo and optimal_token_baseline besides",
    "loss_type": "policy_loss and custom_loss",
    "lr_decay_style": "those of Megatron-LM",
    "lr_wsd_decay_style": "those of Megatron-LM",
    "optimizer": "adam",
    "rm_type": "exact_match, last_number, math, deepscaler and dapo",
    "update_weight_transfer_mode": "the transports by their names",
    "tis_level": "token, sequence and geometric",
    "rs_level": "token, sequence and geometric",
    "tis_mode": "truncate, clip and mask",
}
"""The possible values, by key, where they differ from those elsewhere."""
