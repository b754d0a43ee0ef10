#!/bin/bash
set -ex

CKPT_ARGS=(
    --hf-checkpoint /root/Qwen3-0.6B
    --ref-load /root/Qwen3-0.6B
)

ROLLOUT_ARGS=(
    --prompt-data /root/gsm8k/train.parquet
    --input-key messages
    --label-key label
    --apply-chat-template
    --rollout-shuffle
    --rm-type math
    --num-rollout 100
    --rollout-batch-size 16
    --n-samples-per-prompt 8
    --rollout-max-response-len 1024
    --rollout-temperature 0.8
    --global-batch-size 64
)

GRPO_ARGS=(
    --advantage-estimator grpo
    --use-kl-loss
    --kl-loss-coef 0.00
    --kl-loss-type low_var_kl
    --entropy-coef 0.00
    --eps-clip 0.2
    --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
    --optimizer adam
    --lr 1e-6
    --lr-decay-style constant
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.98
)

PERF_ARGS=(
    --train-backend fsdp
    --gradient-checkpointing
    --attn-implementation flash_attention_3
    --use-dynamic-batch-size
    --max-tokens-per-gpu 9216
    --update-weight-buffer-size 536870912
)

SGLANG_ARGS=(
    --rollout-num-gpus-per-engine 1
    --sglang-mem-fraction-static 0.7
    --sglang-attention-backend fa3
    --sglang-decode-log-interval 1000
)

python3 train.py \
    --actor-num-nodes 1 \
    --actor-num-gpus-per-node 2 \
    --colocate \
    ${CKPT_ARGS[@]} \
    ${ROLLOUT_ARGS[@]} \
    ${GRPO_ARGS[@]} \
    ${OPTIMIZER_ARGS[@]} \
    ${PERF_ARGS[@]} \
    ${SGLANG_ARGS[@]}
