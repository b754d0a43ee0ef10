"""Names, types, defaults and choices against the reference."""

from __future__ import annotations

import json
from typing import Any

import pytest

from miles.config.command.compatibility import DIFFERENT_CHOICES, DIFFERENT_DEFAULTS
from miles.config.schema.catalog import SECTIONS, Entry, catalog
from miles.upstream.table import UpstreamFlag, upstream_flags

SETTINGS = [row for row in upstream_flags() if not row.taken]
REFERENCE = [row for row in SETTINGS if row.group not in ("megatron", "architecture")]
"""Rows whose default is known: of Megatron-LM's own flags it is that of the setting."""

OWN = """--name --run-dir --device --host --redis-url --controller-port --weightsync-port --trainer-port --reward-port
    --trainer-master-port --rank-timeout-s --rollout-workers-elsewhere
    --rollout-port --rollout-num-workers --rollout-backend --rollout-dtype --max-running-requests --reward-service
    --reward-timeout-s --reward-retries --reward-failure-policy --use-icepop --use-mis --train-dtype --share-prompts
    --log-samples-per-step --log-whole-samples --trace-steps --torch-compile
    --no-gateway --gateway-host --gateway-port --gateway-keys-file --gateway-allowed-root
    --gateway-allowed-module --tls-cert --tls-key --tls-ca --tls-mutual
    --rollout-engine-python --rollout-engine-weights --rollout-engine-weights-dir
    --rollout-weight-format --fp8-block-scales --int4-qat --int4-group-size --int4-layers --low-precision-impl
    --precision-metrics-interval --max-nonfinite-steps --save-hf-format
    --enable-draft-training --draft-learning-rate --draft-loss --draft-top-tokens --draft-tokens-per-step
    --draft-batch-tokens --draft-passes --draft-unroll-steps --draft-update-interval --draft-recordings-kept
    --draft-recordings-dir --draft-train-device --draft-responses-per-prompt --draft-acceptance-alarm
    --observe-rollout-routing --dynamic-sampling-max-dropped-batches
    --custom-generate-timeout-s --custom-settings
    --chaos --chaos-interval-s --stop-timeout --weight-lease-s --update-weight-full-interval
    --tis-threshold
    --policy-loss-type --sapo-tau-pos --sapo-tau-neg --vespo-k-pos --vespo-lambda-pos --vespo-k-neg --vespo-lambda-neg
    --dro-beta --echo-loss-coef --gdpo-rewards
    --opd-teacher-key-file --opd-teacher-timeout-s"""

MEGATRON = """--main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype --optimizer-offload-fraction
    --gradient-accumulation-fusion --ckpt-format --auto-detect-ckpt-format
    --num-layers-per-virtual-pipeline-stage --account-for-embedding-in-pipeline-split
    --account-for-loss-in-pipeline-split --pipeline-model-parallel-layout --cross-entropy-loss-fusion
    --overlap-moe-expert-parallel-comm --delay-wgrad-compute --enable-cuda-graph --external-cuda-graph
    --cuda-graph-impl --moe-shared-expert-overlap --moe-router-fusion --moe-z-loss-coeff
    --moe-expert-capacity-factor --moe-pad-expert-input-to-capacity --moe-input-jitter-eps"""
"""Megatron-LM's own flags that no script passes, so that the table has no row of them."""

MEGATRON_NUMERICS = """--bf16 --accumulate-allreduce-grads-in-fp32 --hidden-dropout --attention-dropout
    --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-masked-softmax-fusion
    --use-flash-attn --cp-comm-type --enable-experimental --no-check-for-nan-in-loss-and-grad
    --ref-micro-batch-size"""

MEGATRON_MODELS = """--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --group-query-attention
    --num-query-groups --kv-channels --normalization --norm-epsilon --apply-layernorm-1p --qk-layernorm
    --post-self-attn-layernorm --post-mlp-layernorm --swiglu --activation-func-clamp-value
    --no-activation-func-clamp-shared-expert --disable-bias-linear --add-qkv-bias
    --untie-embeddings-and-output-weights --vocab-size --make-vocab-size-divisible-by --max-position-embeddings
    --position-embedding-type --no-position-embedding --use-rotary-position-embeddings --rotary-base --rotary-percent
    --rotary-interleaved --use-rope-scaling --spec --num-experts --moe-layer-freq --moe-ffn-hidden-size
    --moe-shared-expert-intermediate-size --moe-shared-expert-gate --moe-latent-size --moe-router-topk
    --moe-router-score-function --moe-router-pre-softmax --moe-router-enable-expert-bias
    --moe-router-topk-scaling-factor --moe-router-num-groups --moe-router-group-topk --multi-latent-attention
    --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim --rope-type --rotary-scaling-factor
    --original-max-position-embeddings --beta-fast --beta-slow --mscale --mscale-all-dim --attention-output-gate
    --use-gated-attention --softmax-type --window-size --window-attn-skip-freq --experimental-attention-variant
    --dsa-indexer-n-heads --dsa-indexer-head-dim --dsa-indexer-topk --dsv4-window-size --dsv4-compress-ratios
    --dsv4-compress-rope-theta --dsv4-n-hash-layers --dsv4-hc-mult --dsv4-hc-sinkhorn-iters --dsv4-o-groups
    --dsv4-o-lora-rank"""


TAKES_SEVERAL = {"opd_teacher_load"}
"""Settings that take one value or several, where the reference takes one."""


def entry_of(name: str) -> Entry:
    return next(entry for entry in catalog().values() if name in (entry.flag, entry.key))


def parsed(text: str) -> Any:
    if text in ("None", "REQUIRED", "null"):
        return None
    text = text.removesuffix("(dest)")
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def test_every_setting_is_an_upstream_flag_or_our_own() -> None:
    upstream = {entry_of(row.flag).flag for row in SETTINGS}
    assert {entry.flag for entry in catalog().values()} == upstream | set(
        OWN.split() + MEGATRON.split() + MEGATRON_NUMERICS.split() + MEGATRON_MODELS.split()
    )


def test_every_upstream_flag_is_a_setting_or_has_a_reason_and_a_way_out() -> None:
    names = {name for entry in catalog().values() for name in (entry.flag, entry.key)}
    rows = upstream_flags()
    assert [row.flag for row in rows if not row.taken and row.flag not in names] == [], "say why it is no setting"
    assert [row.flag for row in rows if row.taken and row.flag in names] == [], "it is a setting: drop taken to remedy"
    assert {row.taken for row in rows} == {"", "refused", "no effect"}
    assert [row.flag for row in rows if bool(row.reason) != bool(row.taken)] == []
    assert [row.flag for row in rows if bool(row.remedy) != (row.taken == "refused")] == []


@pytest.mark.parametrize("row", REFERENCE, ids=[f"{i}{row.flag}" for i, row in enumerate(REFERENCE)])
def test_kind_default_and_choices_are_those_of_the_table(row: UpstreamFlag) -> None:
    entry = entry_of(row.flag)
    kind = row.type.split("(")[0].split()[0]
    several = "nargs" in row.type or entry.key in TAKES_SEVERAL
    assert entry.kind is (tuple if several else {"flag": bool, "json": dict}.get(kind) or eval(kind))
    if entry.element:
        assert entry.element.__name__ == kind
    assert entry.negated == ("store_false" in row.type)
    if entry.ignored is None and parsed(row.default) != (entry.default or (parsed(row.default) and entry.default)):
        assert entry.key in DIFFERENT_DEFAULTS, f"{entry.flag}: {entry.default} instead of {row.default}"
    if set(entry.choices) != set(row.choices):
        assert entry.key in DIFFERENT_CHOICES, f"{entry.flag}: {entry.choices} instead of {row.choices}"


def test_listed_differences_are_differences() -> None:
    same = []
    for key in DIFFERENT_DEFAULTS:
        rows = [row for row in REFERENCE if entry_of(row.flag).key == key]
        if all(parsed(row.default) == catalog()[key].default for row in rows):
            same.append(key)
    assert same == []


def test_every_setting_is_documented() -> None:
    assert [key for key, entry in catalog().items() if len(entry.help) < 10 or not entry.help.endswith(".")] == []


def test_keys_and_flags_are_unique() -> None:
    keys = [key for section in SECTIONS.values() for key in section.model_fields]
    assert [key for key in keys if keys.count(key) > 1] == []
    flags = [entry.flag for entry in catalog().values()]
    assert len(set(flags)) == len(flags)
    opposites = ["--no-" + entry.flag[2:] for entry in catalog().values() if entry.kind is bool]
    assert set(opposites).isdisjoint(flags)
