"""Flags whose defaults or choices differ from those of slime and miles recipes."""

from __future__ import annotations

from collections.abc import Mapping

DIFFERENT_DEFAULTS: Mapping[str, str] = {
    "train_backend": "fsdp instead of megatron, unless a setting of Megatron's is given",
    "n_samples_per_prompt": "8 instead of 1 where an estimator compares them and one would give no gradient",
    "attn_implementation": "auto instead of flash_attention_2, which not every machine has",
    "lr": "1e-6 for every backend, also where fsdp alone had 2e-5",
    "actor_num_gpus_per_node": "8 on CUDA as elsewhere, but 1 on CPU",
    "distributed_backend": "nccl on CUDA as elsewhere, but gloo on CPU",
    "update_weight_transfer_mode": "auto instead of broadcast",
    "tis_lower_bound": "1 / tis_upper_bound, which is 0.5 as elsewhere until tis_upper_bound changes",
    "use_rs": "off until asked for, and a flag instead of a key in a file of its own",
}
"""How the default differs, by key."""

DIFFERENT_CHOICES: Mapping[str, str] = {
    "attn_implementation": "auto, varlen and sdpa",
    "distributed_backend": "nccl and gloo",
    "advantage_estimator": "rloo, dr_grpo and cispo besides",
    "loss_type": "policy_loss",
    "lr_decay_style": "those of Megatron-LM",
    "optimizer": "adam",
    "rm_type": "exact_match, last_number and math",
    "update_weight_transfer_mode": "the transports by their names",
    "tis_level": "token, sequence and geometric",
    "rs_level": "token, sequence and geometric",
    "tis_mode": "truncate, clip and mask",
}
"""The possible values, by key, where they differ from those elsewhere."""
