"""A prompt set: every row of a file, rendered, tokenised and filtered by length."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from miles.data.errors import DataError, Faults
from miles.data.file_rows import read_rows
from miles.data.prompt_fields import PromptFields, PromptRow, parse_row
from miles.data.template import PromptTemplate
from miles.types import Prompt

__all__ = ["PromptFields", "PromptRecord", "PromptSet", "load_prompts"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PromptRecord:
    """One prompt with its tokens, label and metadata."""

    prompt: Prompt
    """The prompt as in the file."""
    tokens: npt.NDArray[np.int32]
    """The rendered and tokenised prompt; int32, shape (tokens,), read-only."""
    label: str | None
    metadata: dict[str, Any]
    """The row's metadata, with tools, if any, under "tools"."""


class PromptSet(Sequence[PromptRecord]):
    """The prompts of one file, in file order."""

    def __init__(self, source: str, records: Sequence[PromptRecord], num_rows: int) -> None:
        self.source = source
        """The file and slice, as given."""
        self.num_rows = num_rows
        """Rows read, including prompts that were skipped for their length."""
        self._records = list(records)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> PromptRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PromptRecord]: ...
    def __getitem__(self, index: int | slice) -> PromptRecord | Sequence[PromptRecord]:
        return self._records[index]


def load_prompts(
    source: str,
    template: PromptTemplate,
    fields: PromptFields | None = None,
    *,
    max_prompt_len: int | None = None,
    check: Callable[[PromptRow], None] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> PromptSet:
    """Read `source` (`file` or `file@[start:end]`) into a prompt set.

    Prompts of more than `max_prompt_len` tokens are skipped. `metadata` is added to that of each row. `check` raises
    DataError for further rows that cannot be used. Raises DataError listing the faults of the file, or when no prompt
    is short enough.
    """
    fields = fields or PromptFields()
    file_rows = read_rows(source)
    rows: list[PromptRow] = []
    texts: list[str] = []
    faults = Faults()
    for file_row in file_rows:
        try:
            row = parse_row(file_row.values, fields)
            if metadata:
                row = dataclasses.replace(row, metadata={**row.metadata, **metadata})
            if check is not None:
                check(row)
            text = template.render(row.prompt, row.tools)
        except DataError as error:
            faults.add(f"{file_row.where}: {error}")
        else:
            rows.append(row)
            texts.append(text)
    faults.check()
    _warn_of_unused_tools(source, rows, texts, template)
    tokens = template.tokenize(texts)
    for file_row, ids in zip(file_rows, tokens, strict=True):
        if not len(ids):
            faults.add(f"{file_row.where}: the prompt has no tokens")
    faults.check()
    prompts = [
        PromptRecord(row.prompt, ids, row.label, row.metadata)
        for row, ids in zip(rows, tokens, strict=True)
        if max_prompt_len is None or len(ids) <= max_prompt_len
    ]
    if not prompts:
        shortest = min(len(ids) for ids in tokens)
        raise DataError(
            f"{source}: all {len(rows)} prompts are longer than {max_prompt_len} tokens, the shortest has {shortest}; "
            "raise that limit (rollout_max_prompt_len or eval_max_prompt_len, and rollout_max_context_len)"
        )
    if len(prompts) < len(rows):
        log.warning("%s: left out %d of %d prompts, longer than %s tokens",
                    source, len(rows) - len(prompts), len(rows), max_prompt_len)  # fmt: skip
    return PromptSet(source, prompts, len(rows))


def _warn_of_unused_tools(
    source: str, rows: Sequence[PromptRow], texts: Sequence[str], template: PromptTemplate
) -> None:
    """Warn when the first prompt with tools reads the same without them."""
    first = next(((row, text) for row, text in zip(rows, texts, strict=True) if row.tools), None)
    if first is None:
        return
    try:
        without_tools = template.render(first[0].prompt)
    except DataError:  # a template that cannot do without tools uses them
        return
    if without_tools == first[1]:
        log.warning("%s: the prompts do not show their tools; the chat template, if any, does not use them", source)
