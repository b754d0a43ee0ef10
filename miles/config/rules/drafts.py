"""Rules about drafts of speculative decoding and their training."""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles.config.rules.registry import needs, rule
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.speculation import DraftKind, speculation_of

_TRAINABLE = (DraftKind.EAGLE3, DraftKind.STANDALONE)
_OF_TRAINING = (
    "draft_learning_rate",
    "draft_loss",
    "draft_top_tokens",
    "draft_tokens_per_step",
    "draft_batch_tokens",
    "draft_passes",
    "draft_update_interval",
    "draft_recordings_kept",
    "draft_recordings_dir",
    "draft_train_device",
)
_WHY_NOT = {
    DraftKind.NONE: ("engines draft nothing", "set sglang_speculative_algorithm to EAGLE3 or STANDALONE"),
    DraftKind.MTP: (
        "the draft is made of the policy's own MTP layers",
        "leave it out, and set enable_mtp_training, which trains them with the policy",
    ),
    DraftKind.EAGLE: (
        "heads of EAGLE-1 and -2 predict hidden states, which a policy that moves makes obsolete, and are not trained",
        "set sglang_speculative_algorithm to EAGLE3, with a head of that kind or none",
    ),
    DraftKind.NGRAM: ("NGRAM drafts from earlier responses, without a model", "leave it out"),
    DraftKind.OTHER: ("nothing here knows that draft's model", "set that to EAGLE3 or STANDALONE, or leave this out"),
}


@rule
def draft_training_has_a_model_to_train(s: FlatSettings) -> Iterator[Fault]:
    if not s.enable_draft_training or s.rollout_external_engine_addrs is not None:
        return
    kind = speculation_of(s.sglang_args).kind
    if kind not in _TRAINABLE:
        algorithm = s.sglang_args.get("speculative_algorithm")
        named = f"sglang_speculative_algorithm = {algorithm}: " if algorithm else ""
        problem, remedy = _WHY_NOT[kind]
        yield Fault("enable_draft_training", True, named + problem, remedy)


@rule
def draft_training_has_both_halves(s: FlatSettings) -> Iterator[Fault]:
    if not s.enable_draft_training:
        return
    for key, missing in (("debug_rollout_only", "has no trainer to record"), ("debug_train_only", "has no engines")):
        if getattr(s, key):
            yield Fault("enable_draft_training", True, f"{key} {missing}", "leave one of them out")
    if s.num_rollout == 0:
        yield Fault("enable_draft_training", True, "num_rollout = 0 trains nothing to learn from", "leave it out")


@rule
def drafts_of_external_engines_are_their_own(s: FlatSettings) -> Iterator[Fault]:
    if s.enable_draft_training and s.rollout_external_engine_addrs is not None:
        problem = "servers of rollout_external_engine_addrs run already, and what they draft with is not known here"
        yield Fault("enable_draft_training", True, problem, "leave it out, or have the run start its engines")


@rule
def drafts_with_weights_have_some(s: FlatSettings) -> Iterator[Fault]:
    speculation = speculation_of(s.sglang_args)
    if speculation.draft_model_path is not None or speculation.kind not in _TRAINABLE:
        return
    key = "sglang_speculative_draft_model_path"
    algorithm = f"sglang_speculative_algorithm = {s.sglang_args['speculative_algorithm']}"
    if speculation.kind is DraftKind.STANDALONE:
        yield Fault(key, None, f"{algorithm} drafts with a small model", "set it to its folder")
    elif not s.enable_draft_training:
        remedy = "set it to the folder of a head, or enable_draft_training, which begins one from nothing"
        yield Fault(key, None, f"{algorithm} drafts with a head that was trained for the policy", remedy)


@rule
def settings_of_draft_training_need_it(s: FlatSettings) -> Iterator[Fault]:
    for key in _OF_TRAINING:
        yield from needs(s, key, "enable_draft_training")
    if s.given("draft_unroll_steps"):
        steps = s.draft_unroll_steps
        kind = speculation_of(s.sglang_args).kind
        derived = speculation_of(s.sglang_args).num_steps or 1
        if steps != derived and not s.enable_draft_training:
            problem, remedy = "it does nothing without enable_draft_training", "turn that on, or leave this out"
            yield Fault("draft_unroll_steps", steps, problem, remedy)
        elif steps != derived and kind is DraftKind.STANDALONE:
            problem = "a standalone draft reads tokens, and is not trained on what it has drafted itself"
            yield Fault("draft_unroll_steps", steps, problem, "leave it out")


@rule
def draft_batches_are_parts_of_a_recording(s: FlatSettings) -> Iterator[Fault]:
    if s.enable_draft_training and s.draft_batch_tokens > s.draft_tokens_per_step:
        problem = f"a recording has draft_tokens_per_step = {s.draft_tokens_per_step} tokens"
        yield Fault("draft_batch_tokens", s.draft_batch_tokens, problem, "lower it, or raise draft_tokens_per_step")


@rule
def the_draft_has_a_device(s: FlatSettings) -> Iterator[Fault]:
    device = s.draft_train_device
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        yield Fault("draft_train_device", device, "it names no device", "set it to cpu, cuda, cuda:N or auto")
    elif device.startswith("cuda") and s.device == "cpu":
        yield Fault("draft_train_device", device, "device is cpu", "set it to auto, or leave it out")


@rule
def an_alarm_of_acceptance_needs_drafts(s: FlatSettings) -> Iterator[Fault]:
    alarm = s.draft_acceptance_alarm
    if alarm == catalog()["draft_acceptance_alarm"].default or s.rollout_external_engine_addrs is not None:
        return
    if not speculation_of(s.sglang_args).is_on:
        problem = "engines draft nothing"
        yield Fault("draft_acceptance_alarm", alarm, problem, "set sglang_speculative_algorithm, or leave this out")
