"""Rules about the drafts of SGLang's servers: what they would get wrong, and what they would not do."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.sglang.adaptive_steps import why_not_adaptive
from miles.config.speculation import DraftKind, speculation_of

_ROUTING = ("use_rollout_routing_replay", "observe_rollout_routing")
_REJECTION = "speculative_use_rejection_sampling"


@rule
def drafts_are_verified_on_a_gpu(s: FlatSettings) -> Iterator[Fault]:
    drafts = speculation_of(s.sglang_args)
    if s.rollout_backend == "sglang" and drafts.is_on and s.device == "cpu":
        problem = "on a CPU SGLang verifies drafts greedily, whatever the temperature"
        remedy = "leave it out, or set rollout_backend to torch"
        yield Fault("sglang_speculative_algorithm", drafts.kind.name, problem, remedy)


@rule
def routing_is_recorded_of_chains_of_drafts(s: FlatSettings) -> Iterator[Fault]:
    """SGLang moves the keys and values of an accepted branch behind each other, and not what it recorded of experts;
    its worker of NGRAM loses what was recorded (`ngram_worker.py`)."""
    drafts = speculation_of(s.sglang_args)
    on = next((name for name in _ROUTING if getattr(s, name)), None)
    if s.rollout_backend != "sglang" or on is None:
        return
    if drafts.kind is DraftKind.NGRAM:
        problem = f"SGLang loses the experts of tokens that it verifies so, and {on} needs them"
        yield Fault("sglang_speculative_algorithm", "NGRAM", problem, "choose a draft model, or leave it out")
    elif drafts.is_on and drafts.topk > 1:
        problem = f"SGLang returns experts of branches that were not accepted, and {on} needs the others"
        yield Fault("sglang_speculative_eagle_topk", drafts.topk, problem, "set it to 1")


@rule
def steps_adapt_where_sglang_can(s: FlatSettings) -> Iterator[Fault]:
    drafts = speculation_of(s.sglang_args)
    asked = s.rollout_backend == "sglang" and drafts.is_on and drafts.adaptive
    if asked and (problem := why_not_adaptive(drafts, s.sglang_args)) is not None:
        yield Fault("sglang_speculative_adaptive", True, problem, "leave it out")


@rule
def rejection_sampling_is_of_eagle_chains(s: FlatSettings) -> Iterator[Fault]:
    drafts = speculation_of(s.sglang_args)
    if s.rollout_backend != "sglang" or not s.sglang_args.get(_REJECTION):
        return
    if drafts.kind not in (DraftKind.MTP, DraftKind.EAGLE, DraftKind.EAGLE3) or drafts.topk != 1:
        problem = "SGLang has it for EAGLE, EAGLE3 and NEXTN with one branch"
        yield Fault(f"sglang_{_REJECTION}", True, problem, "leave it out")
    elif s.sglang_args.get("speculative_adaptive_config") is not None:
        problem = "SGLang's rejection sampling fails in a step without drafts, which other tiers may have"
        yield Fault(f"sglang_{_REJECTION}", True, problem, "leave out sglang_speculative_adaptive_config")
