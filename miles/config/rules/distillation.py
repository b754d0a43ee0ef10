"""Rules about on-policy distillation: teachers, where they are, and what is taken from them."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from miles.config.rules.registry import needs, rule
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.sections.distillation import DEFAULT_TEACHER, split_name

_OF_SERVERS = ("opd_teacher_urls", "rm_url", "opd_teacher_key_file", "opd_teacher_timeout_s")
_OF_SETS = ("opd_top_k_strategy", "opd_reward_weight_mode")


@rule
def distillation_settings_need_distillation(s: FlatSettings) -> Iterator[Fault]:
    for key, entry in catalog().items():
        if entry.section == "distillation" and key != "use_opd" and entry.states is None:
            yield from needs(s, key, "use_opd")


@rule
def distillation_has_a_teacher(s: FlatSettings) -> Iterator[Fault]:
    if not s.use_opd:
        return
    if s.opd_type is None:
        problem = "use_opd does not say where its teacher is"
        yield Fault("opd_type", None, problem, "set it to sglang for servers, or to megatron for the trainer")
    elif s.opd_type == "megatron":
        if not s.opd_teacher_load:
            yield Fault("opd_teacher_load", None, "use_opd needs a teacher", "set it to a Hugging Face folder")
        for key in _OF_SERVERS:
            if getattr(s, key) != catalog()[key].default:
                problem = "opd_type = megatron asks no server"
                yield Fault(key, getattr(s, key), problem, "set opd_type to sglang, or leave it out")
    else:
        if s.opd_teacher_load:
            problem = "opd_type = sglang asks servers, which load their teachers themselves"
            yield Fault("opd_teacher_load", s.opd_teacher_load[0], problem, "set opd_type to megatron, or leave it out")
        if not s.opd_teacher_urls and s.rm_url is None:
            problem = "opd_type = sglang needs the server of a teacher"
            yield Fault("rm_url", None, problem, "set it to http://HOST:PORT/generate, or opd_teacher_urls")
        if s.opd_teacher_urls and s.rm_url is not None:
            problem = "opd_teacher_urls names the teachers"
            yield Fault("rm_url", s.rm_url, problem, f"leave it out, or name it {DEFAULT_TEACHER} there")


@rule
def teachers_have_names(s: FlatSettings) -> Iterator[Fault]:
    for key, what in (("opd_teacher_load", "DIR"), ("opd_teacher_urls", "URL")):
        values = getattr(s, key) or ()
        names: set[str] = set()
        for value in values:
            name, rest = split_name(value)
            if rest == value and (key == "opd_teacher_urls" or len(values) > 1):
                yield Fault(key, value, "it has no name before =", f"write it as NAME={what}")
            elif name in names:
                yield Fault(key, value, f"{name} is named twice", "give each teacher a name of its own")
            names.add(name)


@rule
def teachers_have_urls(s: FlatSettings) -> Iterator[Fault]:
    urls = [("opd_teacher_urls", value) for value in s.opd_teacher_urls or ()]
    urls += [("rm_url", s.rm_url)] if s.rm_url is not None else []
    for key, value in urls:
        if (problem := why_no_url(split_name(value)[1])) is not None:
            yield Fault(key, value, problem, "write it as http://HOST:PORT/generate")


def why_no_url(url: str) -> str | None:
    """Say why a text is not the URL of a teacher; None when it is one."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"it is no URL ({error})"
    if parts.scheme not in ("http", "https") or not host:
        return "it is no URL of a server"
    if parts.username is not None or parts.password is not None:
        return "it has a password, which logs would show; opd_teacher_key_file takes a key"
    return None


@rule
def teachers_are_chosen_by_name(s: FlatSettings) -> Iterator[Fault]:
    if s.use_opd and s.opd_teacher_key != catalog()["opd_teacher_key"].default:
        values = (s.opd_teacher_load if s.opd_type == "megatron" else s.opd_teacher_urls) or ()
        if all(split_name(value)[0] == DEFAULT_TEACHER for value in values):
            problem = "there is one teacher, which all samples have"
            yield Fault("opd_teacher_key", s.opd_teacher_key, problem, "name several teachers, or leave it out")


@rule
def served_teachers_score_at_temperature_one(s: FlatSettings) -> Iterator[Fault]:
    if s.use_opd and s.opd_type == "sglang" and s.rollout_temperature != 1:
        problem = (
            "SGLang gives log-probabilities of prompts at temperature 1 whatever it is asked for, and those at another "
            "one do not follow from them"
        )
        remedy = "set it to 1, or opd_type to megatron, which scores at any temperature"
        yield Fault("rollout_temperature", s.rollout_temperature, problem, remedy)


@rule
def top_k_settings_need_top_k(s: FlatSettings) -> Iterator[Fault]:
    if s.use_opd and not s.opd_log_prob_top_k:
        for key in _OF_SETS:
            if getattr(s, key) != catalog()[key].default:
                problem = "opd_log_prob_top_k = 0 takes the sampled token alone"
                yield Fault(key, getattr(s, key), problem, "raise opd_log_prob_top_k, or leave it out")
    if s.use_opd and s.opd_log_prob_top_k and s.keep_old_actor:
        problem = "old actors give the log-probability of the sampled token alone"
        yield Fault("keep_old_actor", True, problem, "leave it out, or set opd_log_prob_top_k to 0")
