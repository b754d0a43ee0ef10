"""Prompt sets: files of prompts, rendered and tokenised, in an endless reproducible order."""

from miles.data.errors import DataError
from miles.data.order import PromptOrder
from miles.data.prompts import PromptFields, PromptRecord, PromptSet, load_prompts
from miles.data.records import Record, parse_source, read_records
from miles.data.source import PromptSource, eval_sources, train_source
from miles.data.template import PromptTemplate, load_tokenizer

__all__ = [
    "DataError",
    "PromptFields",
    "PromptOrder",
    "PromptRecord",
    "PromptSet",
    "PromptSource",
    "PromptTemplate",
    "Record",
    "eval_sources",
    "load_prompts",
    "load_tokenizer",
    "parse_source",
    "read_records",
    "train_source",
]
