"""Which settings may differ between a checkpoint and a run: every one has a rule, and the page says the same."""

from __future__ import annotations

import pathlib

import pytest

from miles.config import JobConfig
from miles.config.resume_rules import Effect, changes, effect_of, recorded, rules_table
from miles.config.schema.catalog import catalog

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "data.md"
FLAT = {
    "hf_checkpoint": "m", "prompt_data": "p.jsonl", "rm_type": "exact_match", "label_key": "label",
    "num_rollout": 2, "rollout_batch_size": 2,
    "rollout_max_response_len": 4, "n_samples_per_prompt": 2,
}  # fmt: skip


def test_every_setting_has_a_rule() -> None:
    assert all(isinstance(effect_of(key), Effect) for key in catalog())


@pytest.mark.parametrize(
    "key", ["redis_url", "train_env_vars", "reward_service", "gateway_keys_file", "sglang_api_key", "run_dir", "load"]
)
def test_checkpoints_record_no_address_and_no_secret(key: str) -> None:
    assert effect_of(key) is Effect.FREE
    assert key not in recorded({key: "x"})


def test_changes_are_named_in_words() -> None:
    was = JobConfig.from_flat(FLAT).to_flat()
    now = JobConfig.from_flat({**FLAT, "num_rollout": 3, "lr": 1e-5, "lora_rank": 8, "run_dir": "other"}).to_flat()
    found = changes(recorded(was), now)
    assert {"num_rollout 2 → 3", "lr 1e-06 → 1e-05", "lora_rank 0 → 8"} <= set(map(str, found))
    assert {change.key: change.effect for change in found}["lora_rank"] is Effect.REFUSED
    assert "run_dir" not in {change.key for change in found}
    assert not changes(was, was)
    assert not changes({}, now), "a setting that the checkpoint does not know is no change"


def test_the_page_has_the_table() -> None:
    assert rules_table() in PAGE.read_text(encoding="utf-8"), f"replace the table in {PAGE.name} by:\n{rules_table()}"
