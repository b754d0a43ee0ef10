from __future__ import annotations

import json
import pathlib
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.tiny.make import DIGITS, END, VOCABULARY, draw, make, make_tokenizer
from miles.data.template import PromptTemplate, load_tokenizer


@pytest.mark.parametrize(("moe", "kind", "parameters"), [(False, "qwen3", 125_000), (True, "qwen3_moe", 225_000)])
def test_a_tiny_checkpoint_loads_and_is_the_same_for_the_same_seed(
    tmp_path: pathlib.Path, moe: bool, kind: str, parameters: int
) -> None:
    losses = [make(tmp_path / name, moe=moe, seed=3, steps=3, batch=8) for name in ("a", "b")]
    assert losses[0] == losses[1]
    for name in ("model/model.safetensors", "model/tokenizer.json", "train.jsonl", "eval.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model", dtype=torch.float32)
    assert model.config.model_type == kind
    assert model.config.eos_token_id == VOCABULARY.index(END)
    assert model.generation_config.eos_token_id == VOCABULARY.index(END)
    assert 0.9 * parameters < model.num_parameters() <= parameters


def test_training_and_evaluation_prompts_are_sorting_tasks_of_their_own(tmp_path: pathlib.Path) -> None:
    make(tmp_path, moe=False, steps=1, batch=1)
    train, evaluation = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("train.jsonl", "eval.jsonl")
    )
    for row in train + evaluation:
        digits, end = row["prompt"][:-1], row["prompt"][-1]
        assert (len(digits), end) == (DIGITS, ">")
        assert row["label"] == "".join(sorted(digits))
    assert [row["prompt"] for row in train[: len(evaluation)]] != [row["prompt"] for row in evaluation]


def test_the_tokenizer_reads_and_writes_characters(tmp_path: pathlib.Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    prompt, answer = draw(random.Random(0))
    [tokens] = PromptTemplate(tokenizer).tokenize([prompt])
    assert [VOCABULARY[token] for token in tokens] == list(prompt)
    response = [VOCABULARY.index(character) for character in answer] + [tokenizer.eos_token_id]
    assert tokenizer.decode(response, skip_special_tokens=True) == answer
    assert PromptTemplate(tokenizer, True).render([{"role": "user", "content": prompt[:-1]}]) == prompt
