MODEL_ARGS=(
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --num-layers 24
    --hidden-size 896
    --ffn-hidden-size 4864
    --num-attention-heads 14
    --group-query-attention
    --num-query-groups 2
    --use-rotary-position-embeddings
    --norm-epsilon 1e-6
    --rotary-base "${ROTARY_BASE:-1000000}"
    --vocab-size 151936
    --add-qkv-bias
)
