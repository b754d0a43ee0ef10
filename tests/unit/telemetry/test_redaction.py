"""Secrets do not leave in text, configurations or log lines."""

from __future__ import annotations

import io
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.config.schema.catalog import catalog
from miles.telemetry.redaction import REDACTED, RedactingFormatter, redact, redact_config

SECRET = "Zx9" * 12


@pytest.mark.parametrize(
    "text",
    [
        f"redis://user:{SECRET}@host:6379/0",
        f"connecting to rediss://:{SECRET}@h",
        f"Authorization: Bearer {SECRET}",
        f"password={SECRET}",
        f"PASSWORD: '{SECRET}'",
        f'{{"api_key": "{SECRET}"}}',
        f"WANDB_API_KEY={SECRET} next",
        f"HF_TOKEN={SECRET}",
        f"client_secret = {SECRET}",
        f"mk_0123abcd_{SECRET}",
        f"hf_{SECRET}",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}",
    ],
)
def test_secrets_in_text_are_blotted_out(text: str) -> None:
    for clean in (redact(text), redact(f"before {text} after")):
        assert SECRET not in clean
        assert REDACTED in clean
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "step 3 took 1.5 s, 120 tokens/s",
        "input_key = prompt; label_key = label; reward_key: math",
        "http://127.0.0.1:8000/v1/jobs/a",
        "redis://127.0.0.1:6379/0",
        "tokens: 12, stop_token_ids=[1, 2]",
        "max_tokens_per_gpu=4096",
        "/data/secrets.jsonl was read",
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


@given(st.text(max_size=300))
def test_any_text_can_be_redacted_and_once_is_enough(text: str) -> None:
    assert redact(redact(text)) == redact(text)


def test_a_long_line_is_redacted_in_good_time() -> None:
    assert redact("a" * 200_000 + f" password={SECRET}").endswith(REDACTED)
    redact("http://" * 20_000)
    redact("api_key" * 20_000)


def test_settings_that_hold_secrets_are_blotted_out() -> None:
    flat = {
        "lr": 1e-6,
        "input_key": "prompt",
        "redis_url": f"redis://:{SECRET}@h",
        "train_env_vars": {"WANDB_API_KEY": SECRET, "A": "1"},
        "sglang_api_key": SECRET,
        "nested": {"token": SECRET, "items": [f"password={SECRET}"]},
        "nothing": None,
    }
    clean = redact_config(flat)
    assert SECRET not in str(clean)
    assert clean["lr"] == 1e-6
    assert clean["input_key"] == "prompt"
    assert clean["train_env_vars"] == {"WANDB_API_KEY": REDACTED, "A": REDACTED}
    assert clean["nothing"] is None


def test_no_ordinary_setting_is_blotted_out() -> None:
    flat = dict.fromkeys(catalog(), "value")
    assert [key for key, value in redact_config(flat).items() if value == REDACTED] == ["wandb_key"]


def test_log_lines_and_tracebacks_are_redacted() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactingFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError(f"password={SECRET}")
    except ValueError:
        logger.exception("redis://:%s@h failed", SECRET)
    assert SECRET not in stream.getvalue()
    assert "ValueError" in stream.getvalue()


@pytest.mark.parametrize("password", [SECRET, f"{SECRET}@x", f"{SECRET}/x", f"a#{SECRET}?b", f"%40{SECRET}"])
@pytest.mark.parametrize("scheme", ["redis", "rediss", "unix"])
def test_a_password_of_redis_is_hidden_however_it_is_written(scheme: str, password: str) -> None:
    assert redact(f"cannot use {scheme}://me:{password}@host/0.") == f"cannot use {scheme}://me:{REDACTED}@host/0."


def test_what_follows_a_password_in_quotes_stays() -> None:
    assert redact(f'{{"a": "redis://:{SECRET}@h", "b": "c@d"}}') == f'{{"a": "redis://:{REDACTED}@h", "b": "c@d"}}'
