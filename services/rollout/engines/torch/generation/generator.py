"""Generation one step at a time, without threads: requests in, tokens into the outbox."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import torch

from miles.config.speculation import Speculation
from miles.precision.recipe import Recipe
from miles.services.rollout.engines.base import FinishReason
from miles.services.rollout.engines.torch.drafts.create import create_proposer
from miles.services.rollout.engines.torch.drafts.drafting import Drafting
from miles.services.rollout.engines.torch.drafts.proposer import Policy, Proposer
from miles.services.rollout.engines.torch.generation.outbox import Outbox
from miles.services.rollout.engines.torch.generation.scheduler import Plan, Scheduler
from miles.services.rollout.engines.torch.generation.sequence import Sequence
from miles.services.rollout.engines.torch.generation.verification import Drawn, verify
from miles.services.rollout.engines.torch.model.architecture import model_shape
from miles.services.rollout.engines.torch.model.empty_model import build_empty_model
from miles.services.rollout.engines.torch.model.forward import Forward, pack
from miles.services.rollout.engines.torch.model.hidden_states import HiddenStates
from miles.services.rollout.engines.torch.model.invariance import choose_padding
from miles.services.rollout.engines.torch.model.kv_cache import KVCache
from miles.services.rollout.engines.torch.model.parameters import Parameters
from miles.services.rollout.engines.torch.model.quantised import QuantisedWeights
from miles.services.rollout.engines.torch.model.routing_recorder import RoutingRecorder
from miles.types import SpeculativeStats


@dataclasses.dataclass(frozen=True, slots=True)
class GeneratorOptions:
    """What a generator is built from; the fields are explained at `TorchEngine`."""

    dtype: torch.dtype
    device: torch.device
    max_running_requests: int
    max_total_tokens: int
    max_prefill_tokens: int
    experts_implementation: str
    recipe: Recipe | None
    speculation: Speculation


class Generator:
    """A model, which has no weights at first, the requests it runs, and their undelivered tokens.

    Only one thread may use it, except for `parameters.check`, `quantised` and reading plain attributes.
    """

    def __init__(
        self, config: Any, options: GeneratorOptions, create_proposer: Callable[[Policy], Proposer] = create_proposer
    ) -> None:
        shape = model_shape(config)
        padding = choose_padding(
            shape,
            options.dtype,
            options.device,
            max_running_requests=options.max_running_requests,
            max_prefill_tokens=options.max_prefill_tokens,
            max_drafts=options.speculation.num_steps,
        )
        self.scheduler = Scheduler(options.max_running_requests, padding.max_prefill_tokens)
        model = build_empty_model(config, options.dtype, options.device, options.experts_implementation, options.recipe)
        self.parameters = Parameters(model, options.device)
        self.quantised = (
            None
            if options.recipe is None
            else QuantisedWeights(options.recipe, self.parameters.shapes, options.dtype, options.device)
        )
        self.outbox = Outbox()
        self.version: int | None = None
        self.generated_tokens = 0
        self._device = options.device
        self._recorder = RoutingRecorder(model)
        self._sequences: dict[str, Sequence] = {}
        self.drafting: Drafting | None = None
        if options.speculation.is_on:
            proposer = create_proposer(_policy(config, model, options))
            self.drafting = Drafting(
                proposer,
                options.speculation,
                max_draft_tokens=padding.max_draft_tokens,
                vocabulary=shape.vocabulary,
            )
        layers = () if self.drafting is None else self.drafting.proposer.layers
        self._hidden = HiddenStates(model, layers, shape.layers)
        cache = KVCache(
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            value_dim=shape.value_dim,
            max_slots=options.max_running_requests,
            max_length=options.max_total_tokens,
            dtype=options.dtype,
            device=options.device,
        )
        self._forward = Forward(
            model,
            cache,
            dtype=options.dtype,
            device=options.device,
            padding=padding,
        )

    @property
    def idle(self) -> bool:
        """Whether there is nothing to step: no request, or no weights."""
        return self.version is None or not self._sequences

    def add(self, sequence: Sequence) -> None:
        """Add a request."""
        if self._recorder.layers == 0:
            sequence.routing = None
        if self.drafting is not None:
            sequence.speculative = SpeculativeStats()
        if sequence.response_length >= sequence.request.sampling.max_new_tokens:
            self.outbox.end(sequence.request.request_id, sequence.result(FinishReason.LENGTH))
            return
        self._sequences[sequence.request.request_id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_ids: Seq[str] | None) -> None:
        """End these requests (None: all) with what they have; unknown ids have ended already."""
        for request_id in list(self._sequences) if request_ids is None else request_ids:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                self._end(sequence, FinishReason.ABORT)

    def retract(self) -> None:
        """Take every running request's cache away; what it held is computed again."""
        if self.drafting is not None:
            self.drafting.forget(self.scheduler.running)
        self.scheduler.retract_all()

    def fail(self, error: BaseException) -> None:
        """Fail every request."""
        for request_id in self._sequences:
            self.outbox.fail(request_id, error)
        self._sequences.clear()

    def load(self, version: int, checked: Mapping[str, torch.Tensor]) -> float:
        """Serve these weights, which `parameters.check` returned; return the seconds that the swap took."""
        begin = time.perf_counter()
        self.parameters.swap(checked)
        self.scheduler.weights_changed()
        self.version = version
        if self.drafting is not None:
            self.drafting.weights_changed()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin

    @torch.inference_mode()
    def step(self) -> None:
        """Compute one step and sample a token, and more where drafts are accepted, for every request that is ready."""
        begin = time.perf_counter()
        plan = self.scheduler.plan()
        if self.drafting is not None:
            self.drafting.propose(plan)
        self._forward.prepare(plan)
        self._share_routing(plan, before=True)
        packed = pack(plan)
        self._recorder.enabled = any(
            sequence.routing is not None for sequence in (*plan.decode, *(chunk.sequence for chunk in plan.prefill))
        )
        logits_RV = self._forward.run(plan, packed)
        drawn = verify(logits_RV, packed.drawing)
        kept = {each.sequence.slot: each.accepted for each in drawn}
        if self._recorder.enabled:
            self._record_routing(plan, len(packed.tokens), kept)
        self._share_routing(plan, before=False)
        if self.drafting is not None:
            self.drafting.note_computed(plan, kept, self._hidden.take())
            self.drafting.note_measured(plan, kept, time.perf_counter() - begin)
        for each in drawn:
            self._take_tokens(each)

    def _take_tokens(self, drawn: Drawn) -> None:
        assert self.version is not None
        sequence, before = drawn.sequence, self.generated_tokens
        request_id = sequence.request.request_id
        reason = error = None
        for token, log_prob, top_ids in zip(drawn.tokens, drawn.log_probs, drawn.top_ids, strict=True):
            if math.isnan(log_prob):
                error = FloatingPointError(f"weights of version {self.version} give logits that are not numbers")
                break
            self.generated_tokens += 1
            reason = sequence.append(token, self.version)
            self.outbox.token(request_id, token, log_prob, top_ids)
            if reason is not None:
                break
        sequence.computed += drawn.accepted
        if self.drafting is not None:
            self.drafting.count(drawn, self.generated_tokens - before, self.version)
        if error is not None:
            self._remove(sequence)
            self.outbox.fail(request_id, error)
        elif reason is not None:
            self._end(sequence, reason)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._remove(sequence)
        self.outbox.end(sequence.request.request_id, sequence.result(reason))

    def _remove(self, sequence: Sequence) -> None:
        if self.drafting is not None:
            self.drafting.forget([sequence])
        self.scheduler.remove(sequence)
        del self._sequences[sequence.request.request_id]

    def _record_routing(self, plan: Plan, tokens: int, kept: Mapping[int, int]) -> None:
        choices_NLK = self._recorder.take(tokens)
        row = 0
        for sequence in plan.decode:
            if sequence.routing is not None:
                end = row + 1 + kept[sequence.slot]
                sequence.routing.extend(len(sequence.tokens) - 1, choices_NLK[row:end])
            row += 1 + len(sequence.drafts)
        for chunk in plan.prefill:
            length = chunk.end - chunk.start
            if chunk.sequence.routing is not None:
                chunk.sequence.routing.extend(chunk.start, choices_NLK[row : row + length])
            row += length

    @staticmethod
    def _share_routing(plan: Plan, *, before: bool) -> None:
        for copy in plan.copies if before else plan.shares:
            if copy.target.routing is not None and copy.source.routing is not None:
                copy.target.routing.extend(0, copy.source.routing.prefix(copy.length))


def _policy(config: Any, model: torch.nn.Module, options: GeneratorOptions) -> Policy:
    return Policy(
        speculation=options.speculation,
        config=config,
        model=model,
        dtype=options.dtype,
        device=options.device,
        max_running_requests=options.max_running_requests,
        max_total_tokens=options.max_total_tokens,
    )
