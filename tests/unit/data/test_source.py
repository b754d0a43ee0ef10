"""Data sources as a job's configuration describes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from toy_tokenizer import text_of

from miles.config import JobConfig
from miles.data import eval_sources, train_source

Write = Callable[..., str]


def config_of(checkpoint: str, **flags: Any) -> JobConfig:
    """A valid configuration with these flags."""
    return JobConfig.from_flat(
        {
            "hf_checkpoint": checkpoint,
            "num_rollout": 1,
            "rollout_batch_size": 2,
            "n_samples_per_prompt": 2,
            "global_batch_size": 4,
            "rollout_max_response_len": 8,
            "custom_rm_path": "rewards.score",
        }
        | flags
    )


def test_the_training_source_follows_the_flags(checkpoint: str, write_jsonl: Write) -> None:
    rows = [{"q": f"question {i}" + "!" * i, "a": i, "meta": {"i": i}} for i in range(8)]
    config = config_of(
        checkpoint,
        prompt_data=write_jsonl(*rows) + "@[1:]",
        input_key="q",
        label_key="a",
        metadata_key="meta",
        apply_chat_template=True,
        apply_chat_template_kwargs={"note": "?"},
        rollout_max_prompt_len=21,
        rollout_shuffle=True,
        rollout_seed=7,
    )
    source = train_source(config)
    assert len(source) == 5
    assert source.num_groups(3) == 15
    assert source.order.seed == 7
    first = [source.prompt(group) for group in range(5)]
    assert sorted(record.label or "" for record in first) == ["1", "2", "3", "4", "5"]
    assert [record.label for record in first] != ["1", "2", "3", "4", "5"]
    for record in first:
        assert text_of(record.tokens) == f"U:{record.prompt};A:?"
        assert record.metadata == {"i": int(record.label or "")}


def test_a_prompt_leaves_room_in_the_context(checkpoint: str, write_jsonl: Write) -> None:
    path = write_jsonl({"input": "a" * 9}, {"input": "b" * 10})
    config = config_of(checkpoint, prompt_data=path, rollout_max_context_len=10)
    assert [record.prompt for record in train_source(config).prompts] == ["a" * 9]


def test_evaluation_sets_keep_file_order_and_their_own_keys(checkpoint: str, write_jsonl: Write) -> None:
    train = write_jsonl({"input": "train"})
    one = write_jsonl({"q": "a", "gold": 1}, {"q": "b", "gold": 2}, name="one.jsonl")
    two = write_jsonl({"q": "c", "gold": 3}, name="two.jsonl")
    config = config_of(
        checkpoint,
        prompt_data=train,
        rollout_shuffle=True,
        eval_interval=1,
        eval_prompt_data=["one", one, "two", two + "@[0:1]"],
        eval_input_key="q",
        eval_label_key="gold",
    )
    sources = eval_sources(config)
    assert list(sources) == ["one", "two"]
    assert [(sources["one"].prompt(i).prompt, sources["one"].prompt(i).label) for i in range(2)] == [
        ("a", "1"),
        ("b", "2"),
    ]
    assert not sources["one"].order.shuffle


def test_no_evaluation_sets_without_evaluation_data(checkpoint: str, write_jsonl: Write) -> None:
    assert eval_sources(config_of(checkpoint, prompt_data=write_jsonl({"input": "q"}))) == {}


WITHOUT_TORCH = """
import importlib.machinery, sys
from miles.data import PromptTemplate, load_prompts, load_tokenizer

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
prompts = load_prompts(sys.argv[2], PromptTemplate(load_tokenizer(sys.argv[1]), apply_chat_template=True))
print(len(prompts), "torch" in sys.modules)
"""


def test_prompts_are_read_without_torch(checkpoint: str, write_jsonl: Write) -> None:
    path = write_jsonl({"input": "q"})
    command = [sys.executable, "-c", WITHOUT_TORCH, checkpoint, path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split() == ["1", "False"], result.stderr
