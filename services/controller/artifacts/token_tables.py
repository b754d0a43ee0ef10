"""Makes the table of a sample's tokens: their texts, and what the trainer recorded of each."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from miles.data.errors import DataError
from miles.data.template import load_tokenizer
from miles.rpc.gen import records_pb2
from miles.services.controller.artifacts.token_texts import Decode, token_texts

logger = logging.getLogger(__name__)

_TOKENIZERS = 2
"""Tokenizers that are kept; jobs mostly share one."""


class TokenTables:
    """Makes token tables. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decoder = functools.lru_cache(_TOKENIZERS)(_load_decoder)

    def make(self, settings: Mapping[str, Any], tokens: Mapping[str, Any]) -> records_pb2.TokenTable:
        """Make the table of one sample; `settings` are those of its job, `tokens` a line of the sample log."""
        with self._lock:
            decode = self._decoder(settings["hf_checkpoint"])
        first = tokens["skipped_at"] or len(tokens["ids"])
        texts = [*token_texts(tokens["ids"][:first], decode), *token_texts(tokens["ids"][first:], decode)]
        return records_pb2.TokenTable(
            texts=texts,
            ids=tokens["ids"],
            train_log_probs=_values(tokens["train"]),
            rollout_log_probs=_values(tokens["rollout"]),
            advantages=_values(tokens["advantages"]),
            mask=tokens["mask"],
            skipped=tokens["skipped"],
            skipped_at=tokens["skipped_at"],
        )


def _load_decoder(hf_checkpoint: str) -> Decode:
    try:
        tokenizer = load_tokenizer(hf_checkpoint)
    except DataError as error:  # the model's folder is gone: values without texts are better than nothing
        logger.warning("texts of tokens are not known: %s", error)
        return lambda ids: ""
    return lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _values(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
