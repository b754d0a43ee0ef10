#!/bin/bash
set -ex
pkill -9 sglang

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${HERE}/models/tiny.sh"

FOUND=$(nvidia-smi -L | wc -l)
if [ "$FOUND" -gt 1 ]; then
  GPUS=$FOUND
else
  GPUS=1
fi
STEPS=${STEPS:-20}

CKPT_ARGS=(
   --hf-checkpoint $BASE_DIR/tiny   # the model
   # --load /nowhere
   --save "/data/my runs/tiny"
)
ROLLOUT_ARGS=(
   --prompt-data /data/train.jsonl
   --label-key answer
   --rm-type math
   --num-rollout ${STEPS}
   --rollout-batch-size 8
   --n-samples-per-prompt $((2 * 4))
)
SGLANG_ARGS=(
   --sglang-max-running-requests 512
   --sglang-cuda-graph-bs $(seq 8 8 24)
   --sglang-router-policy cache_aware
)
MISC_ARGS=(--http-proxy http://proxy:1 --attention-softmax-in-fp32)
if [ -n "$WITH_KL" ]; then
  MISC_ARGS+=(--use-kl-loss)
fi

export SGLANG_LOG_LEVEL=info
ray job submit --address="http://127.0.0.1:8265" \
   --runtime-env-json='{"env_vars": {"NCCL_DEBUG": "INFO", "MASTER_ADDR": "${MASTER_ADDR}"}}' \
   -- python3 train_async.py \
   --actor-num-gpus-per-node ${GPUS} \
   ${MODEL_ARGS[@]} ${CKPT_ARGS[@]} \
   ${ROLLOUT_ARGS[@]} "${SGLANG_ARGS[@]}" ${MISC_ARGS[@]}
