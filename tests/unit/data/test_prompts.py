"""Rows become prompts: fields, chat template, token ids, length filter."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_tokenizer import text_of

from miles.data import DataError, PromptFields, PromptRecord, PromptTemplate, load_prompts, load_tokenizer

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.fixture
def load(tokenizer: Any, write_jsonl: Callable[..., str]) -> Callable[..., list[PromptRecord]]:
    """Loads rows written as JSONL: load(row, ..., chat=False, fields=None, kwargs={}, max_prompt_len=None)."""

    def load_rows(
        *rows: Any,
        chat: bool = False,
        fields: PromptFields | None = None,
        kwargs: dict[str, Any] | None = None,
        max_prompt_len: int | None = None,
    ) -> list[PromptRecord]:
        template = PromptTemplate(tokenizer, chat, kwargs or {})
        return list(load_prompts(write_jsonl(*rows), template, fields, max_prompt_len=max_prompt_len))

    return load_rows


Load = Callable[..., list[PromptRecord]]


def test_plain_text_is_tokenised_as_it_is(load: Load) -> None:
    (record,) = load({"input": "1+1"})
    assert record.prompt == "1+1"
    assert record.tokens.dtype == np.int32
    assert record.tokens.tolist() == [17, 11, 17]
    assert not record.tokens.flags.writeable
    assert record.label is None
    assert record.metadata == {}


def test_messages_are_rendered_with_a_generation_prompt(load: Load) -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    (record,) = load({"input": messages}, chat=True)
    assert record.prompt == messages
    assert text_of(record.tokens) == "S:be;U:hi;A:"


def test_text_counts_as_a_user_message_of_a_chat(load: Load) -> None:
    (record,) = load({"input": "hi"}, chat=True)
    assert record.prompt == "hi"
    assert text_of(record.tokens) == "U:hi;A:"


def test_template_kwargs_reach_the_template(load: Load) -> None:
    (record,) = load({"input": "hi"}, chat=True, kwargs={"note": "!", "add_generation_prompt": False})
    assert text_of(record.tokens) == "U:hi;!"


@pytest.mark.parametrize("tools", [[TOOL], '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'])
def test_tools_reach_the_template_and_the_metadata(load: Load, tools: Any) -> None:
    (record,) = load({"input": "hi", "tools": tools, "metadata": {"a": 1}}, chat=True)
    assert text_of(record.tokens) == "T1;U:hi;A:"
    assert record.metadata == {"a": 1, "tools": [TOOL]}


def test_tools_that_no_prompt_shows_are_said(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    load({"input": "hi", "tools": [TOOL]}, chat=True)
    assert "do not show their tools" not in caplog.text
    load({"input": "hi", "tools": [TOOL]})
    assert "the prompts do not show their tools" in caplog.text


def test_a_template_that_needs_tools_takes_rows_that_have_them(
    tokenizer: Any, write_jsonl: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    needy = copy.copy(tokenizer)
    needy.chat_template = "T{{ tools | length }};U:{{ messages[0].content }};"
    path = write_jsonl({"input": "hi", "tools": [TOOL]})
    assert len(load_prompts(path, PromptTemplate(needy, apply_chat_template=True))) == 1
    assert "do not show their tools" not in caplog.text


def test_fields_come_from_the_columns_that_are_named(load: Load) -> None:
    fields = PromptFields("question", "answer", "extra", "functions")
    row = {"question": "q", "answer": "a", "extra": {"x": [1]}, "functions": [TOOL], "input": 3, "metadata": 4}
    (record,) = load(row, fields=fields)
    assert (record.prompt, record.label, record.metadata) == ("q", "a", {"x": [1], "tools": [TOOL]})


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("x", "x"),
        (42, "42"),
        (-1.5, "-1.5"),
        (1e-05, "0.00001"),
        (3.0, "3"),
        (True, "true"),
        (None, None),
        ([1, "é"], '[1, "é"]'),
        ({"a": 1, "b": None}, '{"a": 1, "b": null}'),
        ("", ""),
    ],
)
def test_a_label_becomes_text(load: Load, label: Any, text: str | None) -> None:
    (record,) = load({"input": "q", "answer": label}, fields=PromptFields(label_key="answer"))
    assert record.label == text


@pytest.mark.parametrize("metadata", [None, {}, "{}"])
def test_metadata_may_be_empty(load: Load, metadata: Any) -> None:
    (record,) = load({"input": "q", "metadata": metadata})
    assert record.metadata == {}


FAULTS = [
    ({"prompt": "q"}, {}, "no 'input' (input_key); the keys are 'prompt'"),
    ({}, {}, "no 'input' (input_key); the keys are none"),
    ({"input": "q"}, {"label_key": "answer"}, "no 'answer' (label_key); the keys are 'input'"),
    ({"input": None}, {}, "'input' is null; expected text or a list of messages"),
    ({"input": 3}, {}, "'input' is a number; expected text or a list of messages"),
    ({"input": {"role": "user"}}, {}, "'input' is an object; expected text or a list of messages"),
    ({"input": ""}, {}, "'input' is empty text"),
    ({"input": " \n"}, {}, "'input' is empty text"),
    ({"input": [{"role": "user", "content": ""}]}, {}, "'input' has no message with any text"),
    ({"input": [{"role": "user", "content": 3}]}, {}, "the content of 'input'[0] is a number; expected text or a list"),
    ({"input": []}, {}, "'input' is an empty list of messages"),
    ({"input": ["hi"]}, {}, "'input'[0] is text; a message is an object with role and content"),
    ({"input": [{"content": "hi"}]}, {}, "'input'[0] has no role; its keys are 'content'"),
    ({"input": [{"role": "user"}]}, {}, "'input'[0] has neither content nor tool_calls"),
    ({"input": "q", "metadata": [1]}, {}, "'metadata' is a list; expected an object"),
    ({"input": "q", "metadata": "hello"}, {}, "'metadata' is text that is not JSON; expected object"),
    ({"input": "q", "metadata": "[1]"}, {}, "'metadata' is a list; expected an object"),
    ('{"input": "q", "metadata": {"a": NaN}}', {}, "'metadata' cannot be written as JSON"),
    ('{"input": "q", "metadata": {"a": "\\ud800"}}', {}, "'metadata' cannot be written as JSON"),
    ('{"input": "\\ud800"}', {}, "'input' is not valid Unicode text"),
    ('{"input": "q", "answer": "\\ud800"}', {"label_key": "answer"}, "'answer' is not valid Unicode text"),
    ({"input": "q", "tools": {}}, {}, "'tools' is an object; expected a list of objects"),
    ({"input": "q", "tools": "["}, {}, "'tools' is text that is not JSON"),
    ({"input": [{"role": "user", "content": "hi"}]}, {}, "which needs apply_chat_template"),
]


@pytest.mark.parametrize(("row", "fields", "problem"), FAULTS)
def test_a_faulty_row_is_named(load: Load, row: Any, fields: dict[str, str], problem: str) -> None:
    good = {"input": "q", "answer": "a"}
    with pytest.raises(DataError) as caught:
        load(good, row, good, fields=PromptFields(**fields))
    assert "prompts.jsonl, line 2: " in str(caught.value)
    assert problem in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_all_faulty_rows_are_named_at_once(load: Load) -> None:
    with pytest.raises(DataError) as caught:
        load({"input": 1}, {"input": "q"}, {"output": 2})
    first, second = str(caught.value).splitlines()
    assert "line 1: 'input' is a number" in first
    assert "line 3: no 'input'" in second


def test_a_row_that_the_template_refuses_is_named(checkpoint: str, write_jsonl: Callable[..., str]) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].role) }}"
    template = PromptTemplate(tokenizer, apply_chat_template=True)
    with pytest.raises(DataError, match="line 1: the chat template failed: TemplateError: no user"):
        load_prompts(write_jsonl({"input": "q"}), template)


def test_a_prompt_that_renders_to_nothing_is_named(checkpoint: str, write_jsonl: Callable[..., str]) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = "{% if messages[0].content == 'q' %}q{% endif %}"
    template = PromptTemplate(tokenizer, apply_chat_template=True)
    with pytest.raises(DataError, match="line 2: the prompt has no tokens"):
        load_prompts(write_jsonl({"input": "q"}, {"input": "r"}), template)


def test_longer_prompts_are_left_out(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    records = load({"input": "abcd"}, {"input": "abc"}, {"input": "ab"}, {"input": "abcde"}, max_prompt_len=3)
    assert [record.prompt for record in records] == ["abc", "ab"]
    assert "left out 2 of 4 prompts, longer than 3 tokens" in caplog.text


def test_the_length_filter_counts_the_template(load: Load) -> None:
    assert len(load({"input": "hi"}, chat=True, max_prompt_len=7)) == 1
    with pytest.raises(DataError, match="all 1 prompts are longer than 6 tokens, the shortest has 7"):
        load({"input": "hi"}, chat=True, max_prompt_len=6)


def test_parquet_columns_become_prompts(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    path = str(tmp_path / "prompts.parquet")
    rows = [
        {"input": [{"role": "user", "content": "hi"}], "answer": 4, "metadata": {"level": 1}},
        {"input": [{"role": "user", "content": "yo"}], "answer": 5, "metadata": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    records = load_prompts(path, PromptTemplate(tokenizer, True), PromptFields(label_key="answer"))
    assert [text_of(record.tokens) for record in records] == ["U:hi;A:", "U:yo;A:"]
    assert [(record.label, record.metadata) for record in records] == [("4", {"level": 1}), ("5", {})]


def test_a_parquet_file_without_the_column_names_its_columns(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    path = str(tmp_path / "prompts.parquet")
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), path)
    with pytest.raises(DataError, match=r"row 1: no 'input' \(input_key\); the keys are 'question', 'answer'"):
        load_prompts(path, PromptTemplate(tokenizer))


def test_apply_chat_template_needs_a_chat_template(plain_checkpoint: str) -> None:
    tokenizer = load_tokenizer(plain_checkpoint)
    assert PromptTemplate(tokenizer).render("hi") == "hi"
    with pytest.raises(DataError, match=r"has no chat template; give one with chat_template_path"):
        PromptTemplate(tokenizer, apply_chat_template=True)


def test_a_chat_template_can_come_from_a_file(plain_checkpoint: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "chat.jinja").write_text("<{{ messages[0].content }}>")
    tokenizer = load_tokenizer(plain_checkpoint, str(tmp_path / "chat.jinja"))
    assert PromptTemplate(tokenizer, apply_chat_template=True).render("hi") == "<hi>"


def test_a_chat_template_file_that_is_not_there_is_refused(checkpoint: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"chat_template_path .*nowhere\.jinja cannot be read"):
        load_tokenizer(checkpoint, str(tmp_path / "nowhere.jinja"))


@pytest.mark.parametrize("name", ["tokenize", "tools", "conversation"])
def test_template_kwargs_may_not_take_over_the_call(tokenizer: Any, name: str) -> None:
    with pytest.raises(DataError, match=f"apply_chat_template_kwargs may not set {name}"):
        PromptTemplate(tokenizer, True, {name: 1})


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="has no tokenizer that can be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="is not a folder"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_many_prompts_keep_their_order(load: Load) -> None:
    texts = [f"prompt {i}" for i in range(2100)]
    records = load(*[{"input": text} for text in texts])
    assert [text_of(record.tokens) for record in records] == texts
