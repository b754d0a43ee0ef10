"""Rules about drafts of an engine that verifies them itself, under SGLang's flags."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.speculation import speculation_of
from miles.engine_spec import engine_spec

_TAKEN = ("algorithm", "num_steps", "num_draft_tokens", "eagle_topk", "draft_model_path", "adaptive")
_COUNTS = {"num_steps": 1, "num_draft_tokens": 2, "eagle_topk": 1}
"""The least of each."""
_LEAVE_OUT = "leave it out"


@rule
def engines_without_servers_verify_some_drafts(s: FlatSettings) -> Iterator[Fault]:
    known = engine_spec(s.rollout_backend).draft_algorithms
    flags = {n.removeprefix("speculative_"): v for n, v in s.sglang_args.items() if n.startswith("speculative_")}
    if known is None or not flags:
        return
    backend = f"rollout_backend = {s.rollout_backend}"
    for name in sorted(flags.keys() - set(_TAKEN)):
        problem, remedy = f"{backend} verifies drafts in one way, without it", f"{_LEAVE_OUT}, or take sglang"
        yield Fault(_key(name), flags[name], problem, remedy)
    algorithm = str(flags.get("algorithm") or "").upper()
    if algorithm in ("", "NONE"):
        for name in sorted(flags.keys() & set(_TAKEN) - {"algorithm"}):
            problem = "there are no drafts without sglang_speculative_algorithm"
            yield Fault(_key(name), flags[name], problem, "set it, or leave this out")
        return
    if algorithm not in known:
        problem = f"{backend} has no such drafts"
        remedy = f"choose one of {', '.join(sorted(known))}, or set rollout_backend to sglang"
        yield Fault(_key("algorithm"), flags["algorithm"], problem, remedy)
        return
    wrong = [name for name, least in _COUNTS.items() if not _is_count(flags.get(name, least), least)]
    for name in wrong:
        yield Fault(_key(name), flags[name], f"it must be a count from {_COUNTS[name]} on", "set it to one")
    if not wrong:
        yield from _sizes(s, backend)
    if algorithm == "NGRAM" and (path := flags.get("draft_model_path")) is not None:
        yield Fault(_key("draft_model_path"), path, "drafts of NGRAM come from text, without a model", _LEAVE_OUT)


def _sizes(s: FlatSettings, backend: str) -> Iterator[Fault]:
    speculation = speculation_of(s.sglang_args)
    if speculation.topk != 1:
        problem = f"{backend} verifies trees of one branch"
        yield Fault(_key("eagle_topk"), speculation.topk, problem, "set it to 1, or leave it out")
    if speculation.num_draft_tokens != speculation.num_steps + 1:
        steps, tokens = speculation.num_steps, speculation.num_draft_tokens
        problem = f"of num_steps = {steps} drafts and the last token there are {steps + 1}"
        yield Fault(_key("num_draft_tokens"), tokens, problem, _LEAVE_OUT)


def _key(name: str) -> str:
    return f"sglang_speculative_{name}"


def _is_count(value: object, least: int) -> bool:
    text = str(value)
    return text.isdecimal() and int(text) >= least
