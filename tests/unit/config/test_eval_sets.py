"""Data sets of an evaluation with settings of their own."""

from __future__ import annotations

import base64
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config import ConfigError, JobConfig
from miles.config.eval_sets import EvalSet, eval_sets

FILE = """
eval:
  defaults:
    max_response_len: 12
    temperature: 0.6
    stop: ["\\n"]
  datasets:
    - name: aime
      path: aime.jsonl
      rm_type: last_number
      n_samples_per_eval_prompt: 16
      metadata_overrides: {level: 3}
    - name: plain
      path: plain.jsonl
      temperature: 0
      label_key: target
"""


def sets_of(eval_config: str, **changes: Any) -> tuple[EvalSet, ...]:
    config = JobConfig.from_flat({**MINIMAL, "eval_interval": 1, "eval_config": eval_config, **changes})
    return eval_sets(config.to_flat())


def inline(text: str) -> str:
    return "base64:" + base64.b64encode(text.encode()).decode()


def test_a_set_is_as_it_says_then_as_the_defaults_say_then_as_the_settings_say(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text(FILE)
    aime, plain = sets_of(str(path), eval_top_p=0.9, input_key="text", eval_prompt_data=["not", "read.jsonl"])
    assert (aime.name, aime.path, aime.n_samples, plain.n_samples) == ("aime", "aime.jsonl", 16, 1)
    assert (aime.temperature, plain.temperature, aime.top_p, aime.max_response_len) == (0.6, 0.0, 0.9, 12)
    assert (aime.label_key, plain.label_key, plain.input_key, plain.stop) == ("answer", "target", "text", ("\n",))
    assert (aime.metadata, plain.metadata) == ({"rm_type": "last_number", "level": 3}, {})
    assert sets_of(inline(FILE), eval_top_p=0.9, input_key="text") == (aime, plain)


def test_sets_may_be_named_by_their_keys() -> None:
    (only,) = sets_of(inline('{"datasets": {"a": {"path": "a.jsonl", "top_k": 5}}}'))
    assert (only.name, only.path, only.top_k) == ("a", "a.jsonl", 5)


def test_pairs_of_names_and_files_are_sets_that_say_nothing() -> None:
    data = ["a", "a.jsonl", "b", "b.jsonl"]
    config = JobConfig.from_flat({**MINIMAL, "eval_interval": 1, "eval_prompt_data": data, "eval_top_k": 7})
    assert [(each.name, each.path, each.top_k) for each in eval_sets(config.to_flat())] == [
        ("a", "a.jsonl", 7),
        ("b", "b.jsonl", 7),
    ]
    assert eval_sets(JobConfig.from_flat(MINIMAL).to_flat()) == ()
    assert [each.name for each in eval_sets(config.to_flat() | {"eval_prompt_data": ["a/b", "a.jsonl", "c"]})] == [
        "a/b"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("datasets: [", "it is not YAML"),
        ("a: 1", "it has no data sets"),
        ("datasets: 3", "its datasets are neither a list nor a mapping by name"),
        ("datasets: [x]", "its datasets[0] is no mapping"),
        ("datasets: [{name: a}]", "datasets[0].path"),
        ("datasets: [{name: a/b, path: p}]", "datasets[0].name = 'a/b'"),
        ("datasets: [{name: a, path: p, top_p: 2}]", "datasets[0].top_p = 2"),
        ("datasets: [{name: a, path: p, temprature: 1}]", "datasets[0].temprature"),
        ("datasets: [{name: a, path: p}, {name: a, path: q}]", "a names two data sets"),
        ("datasets: [{name: a, path: p, top_k: 0}]", "a: top_k = 0 leaves no token"),
        ("datasets: [{name: a, path: p, min_new_tokens: 20}]", "a: min_new_tokens = 20 is above max_response_len = 16"),
        ("datasets: [{name: a, path: p, temperature: 1.0e-5}]", "a: logits divided by temperature = 1e-05"),
        ("datasets: [{name: a, path: p, n_samples_per_eval_prompt: 100000}]", "a group holds 65536 at most"),
        ("{datasets: [{name: a, path: p}], delegate: []}", "its key delegate is for evaluation functions"),
        ("{defaults: {name: b}, datasets: [{name: a, path: p}]}", "defaults.name"),
    ],
)
def test_faults_of_the_file_are_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        sets_of(inline(text))
    assert all(fault.field == "eval_config" for fault in raised.value.faults)
    assert words in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        sets_of(str(tmp_path / "none.yaml"))


def test_a_function_that_scores_everything_leaves_no_choice_of_rewards() -> None:
    text = inline("datasets: [{name: a, path: p, rm_type: math}]")
    with pytest.raises(ConfigError, match=r"a: its rm_type has no effect, as custom_rm_path = my\.reward scores"):
        sets_of(text, rm_type=None, custom_rm_path="my.reward")
