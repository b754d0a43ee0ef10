"""Names, types, defaults and choices against the reference."""

from __future__ import annotations

import csv
import json
import pathlib
from typing import Any

import pytest

from miles.config.command.compatibility import DIFFERENT_CHOICES, DIFFERENT_DEFAULTS
from miles.config.schema.catalog import Entry, catalog

REFERENCE = list(csv.DictReader(pathlib.Path(__file__).with_name("reference_flags.tsv").open(), delimiter="\t"))

OWN = """--name --run-dir --device --host --redis-url --controller-port --weightsync-port --trainer-port --reward-port
    --trainer-master-port --rank-timeout-s --rollout-workers-elsewhere
    --rollout-port --rollout-num-workers --rollout-backend --rollout-dtype --max-running-requests --reward-service
    --reward-timeout-s --reward-retries --reward-failure-policy --use-icepop --use-mis --train-dtype --share-prompts
    --log-samples-per-step --log-whole-samples --trace-steps --torch-compile
    --no-gateway --gateway-host --gateway-port --gateway-keys-file --gateway-allowed-root
    --gateway-allowed-module --tls-cert --tls-key --tls-ca --tls-mutual
    --rollout-engine-python --rollout-engine-weights --rollout-engine-weights-dir
    --rollout-weight-format --observe-rollout-routing --dynamic-sampling-max-dropped-batches
    --chaos --chaos-interval-s --stop-timeout --weight-lease-s --update-weight-full-interval"""

MEGATRON = """--tensor-model-parallel-size --pipeline-model-parallel-size --num-virtual-stages-per-pipeline-rank
    --context-parallel-size --expert-model-parallel-size --expert-tensor-parallel-size --sequence-parallel
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --transformer-impl --attention-backend
    --moe-token-dispatcher-type --moe-aux-loss-coeff --recompute-granularity --recompute-method --recompute-num-layers
    --recompute-modules --attention-softmax-in-fp32
    --use-precision-aware-optimizer --main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype
    --optimizer-cpu-offload --optimizer-offload-fraction --overlap-cpu-optimizer-d2h-h2d
    --finetune --no-load-optim --no-load-rng --ckpt-format --auto-detect-ckpt-format
    --save-retain-interval --gradient-accumulation-fusion
    --lr-wsd-decay-style --lr-wsd-decay-iters"""


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


def test_every_flag_is_of_the_reference_or_our_own() -> None:
    assert {entry.flag for entry in catalog().values()} == {entry_of(row["name"]).flag for row in REFERENCE} | set(
        OWN.split() + MEGATRON.split()
    )


@pytest.mark.parametrize("row", REFERENCE, ids=[f"{i}{row['name']}" for i, row in enumerate(REFERENCE)])
def test_kind_default_and_choices_are_those_of_the_reference(row: dict[str, str]) -> None:
    entry = entry_of(row["name"])
    kind = row["type"].split("(")[0].split()[0]
    assert entry.kind is (tuple if "nargs" in row["type"] else {"flag": bool, "json": dict}.get(kind) or eval(kind))
    if entry.element:
        assert entry.element.__name__ == kind
    assert entry.negated == ("store_false" in row["type"])
    if parsed(row["default"]) != (entry.default or (parsed(row["default"]) and entry.default)):
        assert entry.key in DIFFERENT_DEFAULTS, f"{entry.flag}: {entry.default} instead of {row['default']}"
    allowed = {choice for choice in (row["choices"] or "").split(",") if choice}
    if set(entry.choices) != allowed:
        assert entry.key in DIFFERENT_CHOICES, f"{entry.flag}: {entry.choices} instead of {allowed}"


def test_listed_differences_are_differences() -> None:
    same = []
    for key in DIFFERENT_DEFAULTS:
        rows = [row for row in REFERENCE if entry_of(row["name"]).key == key]
        if all(parsed(row["default"]) == catalog()[key].default for row in rows):
            same.append(key)
    assert same == []


def test_every_setting_is_documented() -> None:
    assert [key for key, entry in catalog().items() if len(entry.help) < 10 or not entry.help.endswith(".")] == []


def test_keys_and_flags_are_unique() -> None:
    flags = [entry.flag for entry in catalog().values()]
    assert len(set(flags)) == len(flags)
    opposites = ["--no-" + entry.flag[2:] for entry in catalog().values() if entry.kind is bool]
    assert set(opposites).isdisjoint(flags)
