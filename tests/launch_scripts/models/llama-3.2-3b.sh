MODEL_ARGS=(
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --num-layers 28
    --hidden-size 3072
    --ffn-hidden-size 8192
    --num-attention-heads 24
    --group-query-attention
    --num-query-groups 8
    --use-rotary-position-embeddings
    --norm-epsilon 1e-5
    --rotary-base 500000
    --vocab-size 128256
    --kv-channels 128
)
