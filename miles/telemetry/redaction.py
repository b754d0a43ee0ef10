"""Redacts secrets in text and in configurations before they leave a process."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # user:password@ in a URL; that of Redis ends at the last @, whatever was not written as %XX
    (
        re.compile(r"(?P<keep>\b(?:rediss?|unix)://[^\s:/@]{0,256}:)[^\s\"']{1,1024}(?=@)", re.I),
        rf"\g<keep>{REDACTED}",
    ),
    (
        re.compile(r"(?P<keep>\b[a-z][a-z0-9+.-]{1,20}://[^\s:/@]{0,256}:)[^\s/\"']{1,1024}(?=@)", re.I),
        rf"\g<keep>{REDACTED}",
    ),
    (re.compile(r"(?P<keep>\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.I), rf"\g<keep>{REDACTED}"),
    # NAME=value, NAME: value and "NAME": "value", where the name indicates a secret
    (
        re.compile(
            r"(?P<keep>\b[\w-]{0,64}?(?:password|passwd|secret|api[_-]?key|access[_-]?key|private[_-]?key|auth[_-]?token"
            r"|access[_-]?token|hf[_-]token|wandb[_-]key|credential)s?[\"']?\s{0,3}[=:]\s{0,3}[\"']?)(?!\[redacted\])[^\s\"',;&}]{1,4096}",
            re.I,
        ),
        rf"\g<keep>{REDACTED}",
    ),
    # Tokens with known prefixes
    (re.compile(r"\bmk_[0-9a-f]{8}_[\w-]{20,}"), REDACTED),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[opsu]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b"), REDACTED),
    (
        re.compile(r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,32}PRIVATE KEY-----|\Z)", re.S),
        REDACTED,
    ),
)
_SECRET_KEY = re.compile(
    r"(^|_)(password|passwd|secret|credentials?|api_?key|access_?key|private_?key|auth_token|access_token|hf_token|token|wandb_key)$",
    re.I,
)
_ALL_VALUES = frozenset({"train_env_vars"})
"""Settings with environment variables, each of which may be a secret."""


def redact(text: str) -> str:
    """Replace passwords, keys and tokens in a text by `[redacted]`."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_config(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the values of secret settings in a flat configuration by `[redacted]`."""
    return {key: _redact_value(key, value) for key, value in flat.items()}


def _redact_value(key: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        secret = key in _ALL_VALUES
        return {name: REDACTED if secret else _redact_value(name, item) for name, item in value.items()}
    if _SECRET_KEY.search(key):
        return REDACTED
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact_value("", item) for item in value]
    return value


class RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
