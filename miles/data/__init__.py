"""Prompt sets: files of prompts, rendered and tokenised, in an endless reproducible order.

It samples nothing and knows no service. Start at `source`.
"""

from miles.data.errors import DataError
from miles.data.file_rows import FileRow, parse_file_slice, read_rows
from miles.data.order import PromptOrder
from miles.data.prompts import PromptFields, PromptRecord, PromptSet, load_prompts
from miles.data.source import PromptSource, eval_sources, train_source
from miles.data.template import PromptTemplate, load_tokenizer

__all__ = [
    "DataError",
    "FileRow",
    "PromptFields",
    "PromptOrder",
    "PromptRecord",
    "PromptSet",
    "PromptSource",
    "PromptTemplate",
    "eval_sources",
    "load_prompts",
    "load_tokenizer",
    "parse_file_slice",
    "read_rows",
    "train_source",
]
