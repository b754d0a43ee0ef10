"""A generator of the torch engine driven step by step, and proposers of drafts that know what will come, or err."""

from __future__ import annotations

import dataclasses
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from miles.config.speculation import DraftKind, Speculation
from miles.precision.emulation.experts import PADDED
from miles.services.rollout.engines.base import GenerationDelta, GenerationRequest, GenerationResult, SamplingParams
from miles.services.rollout.engines.torch.drafts.create import create_proposer
from miles.services.rollout.engines.torch.drafts.proposer import Computed, Policy, Proposer
from miles.services.rollout.engines.torch.generation.generator import Generator, GeneratorOptions
from miles.services.rollout.engines.torch.generation.request_rules import RequestRules
from miles.services.rollout.engines.torch.generation.sequence import Sequence as Request
from miles.services.rollout.engines.torch.model.architecture import model_shape, read_checkpoint

STEPS = 4


@dataclasses.dataclass
class Generated:
    """A response put together."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    top_ids: list[Sequence[int]] = dataclasses.field(default_factory=list)
    result: GenerationResult | None = None

    @property
    def ended(self) -> GenerationResult:
        """Its result."""
        assert self.result is not None
        return self.result

    def alike(self) -> tuple[Any, ...]:
        """What has to be the same with drafts and without, bit for bit."""
        routed = self.ended.routed_experts
        return (
            *(self.tokens, self.log_probs, self.top_ids, self.ended.reason, self.ended.weight_versions),
            None if routed is None else (str(routed.dtype), routed.tolist()),
        )


class Driver:
    """A generator without a thread: steps when it is told to."""

    def __init__(
        self,
        folder: pathlib.Path,
        weights: Mapping[str, torch.Tensor] | None,
        proposer: Callable[[Policy], Proposer] | None = create_proposer,
        *,
        dtype: str = "float32",
        steps: int = STEPS,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        """`proposer` None: no drafts."""
        config, tokenizer, end_tokens = read_checkpoint(folder, 512)
        decoder: Any = tokenizer
        self.rules = RequestRules(decoder, end_tokens, vocabulary=model_shape(config).vocabulary, max_total_tokens=512)
        on = Speculation(DraftKind.NGRAM, num_steps=steps, num_draft_tokens=steps + 1, adaptive=adaptive)
        self.generator = Generator(
            config,
            GeneratorOptions(
                **{
                    "dtype": getattr(torch, dtype),
                    "device": torch.device("cpu"),
                    "max_running_requests": 8,
                    "max_total_tokens": 512,
                    "max_prefill_tokens": 64,
                    "experts_implementation": PADDED,
                    "recipe": None,
                    "speculation": Speculation(DraftKind.NONE) if proposer is None else on,
                    **options,
                }
            ),
            proposer or create_proposer,
        )
        if weights is not None:
            self.load(0, weights)
        self.responses: dict[str, Generated] = {}
        self._sequences: dict[str, Request] = {}

    def load(self, version: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Serve these weights from the next step on."""
        self.generator.load(version, self.generator.parameters.check(weights))

    def add(self, *requests: GenerationRequest) -> None:
        """Add requests."""
        for request in requests:
            self.responses[request.request_id] = Generated()
            sequence = self._sequences[request.request_id] = Request(request, self.rules.stop_rule(request.sampling))
            self.generator.add(sequence)

    def step(self) -> None:
        """Take one step, if there is anything to do."""
        if not self.generator.idle:
            self.generator.step()
        self.collect()

    def collect(self) -> None:
        """Take what has been generated out of the outbox."""
        for request_id, delta in self.generator.outbox.take(0.0):
            assert isinstance(delta, GenerationDelta), delta
            response = self.responses[request_id]
            response.tokens += delta.token_ids
            response.log_probs += delta.log_probs
            response.top_ids += delta.top_token_ids
            response.result = delta.result

    def length(self, request_id: str) -> int:
        """New tokens of a running request so far."""
        sequence = self._sequences[request_id]
        return len(sequence.tokens) - sequence.input_length

    def run(self, *requests: GenerationRequest) -> dict[str, Generated]:
        """Add requests and step until all have ended."""
        self.add(*requests)
        while not self.generator.idle:
            self.step()
        self.collect()
        return self.responses


class Oracle:
    """Knows the responses that will come, and errs now and then, or stays silent: always alike for the same seed.

    Checks on the way that it is told of every position once, in order.
    """

    weights = None

    def __init__(
        self,
        future: Mapping[str, Sequence[int]],
        *,
        right: float = 0.8,
        seed: int = 0,
        vocabulary: int = 320,
        layers: Sequence[int] = (),
    ) -> None:
        """`future`: by request id, the whole response, resumed tokens included."""
        self._future = future
        self._right = right
        self._random = random.Random(seed)
        self._vocabulary = vocabulary
        self.layers = layers
        self.known: dict[str, int] = {}
        self.hidden: dict[str, dict[int, list[torch.Tensor]]] = {}

    def propose(self, requests: Sequence[Request], steps: int) -> list[list[int]]:
        """Mostly what will come, one token too many at times."""
        return [self._drafts(request, self._random.randint(0, steps + 1)) for request in requests]

    def _drafts(self, request: Request, count: int) -> list[int]:
        assert self.known.get(request.request.request_id, 0) == len(request.tokens) - 1
        coming = list(self._future.get(request.request.request_id, ())[request.response_length :])[:count]
        return [t if self._random.random() < self._right else self._other(t) for t in coming]

    def _other(self, token: int) -> int:
        """Another token, or now and then none of the policy's."""
        other = (token + self._random.randrange(1, self._vocabulary)) % self._vocabulary
        return other if self._random.random() < 0.9 else self._vocabulary

    def note_computed(self, computed: Sequence[Computed]) -> None:
        """Check that nothing was left out or told twice."""
        for each in computed:
            name = each.request.request.request_id
            assert each.start == self.known.get(name, 0) < each.end
            self.known[name] = each.end
            for layer in self.layers:
                assert each.hidden_ND[layer].shape[0] == each.end - each.start
                self.hidden.setdefault(name, {}).setdefault(layer, []).append(each.hidden_ND[layer].clone())

    def note_shared(self, source: Request, target: Request, length: int) -> None:
        """Check that the source has what it gives."""
        assert self.known[source.request.request_id] >= length
        assert self.known.setdefault(target.request.request_id, 0) == 0
        self.known[target.request.request_id] = length

    def forget(self, request: Request) -> None:
        """Expect its positions again."""
        self.known.pop(request.request.request_id, None)


def request_of(
    request_id: str, prompt: Sequence[int], *, resumed: Sequence[int] = (), routed: bool = False, top: int = 0,
    **sampling: Any,
) -> GenerationRequest:  # fmt: skip
    """A request, of 40 tokens unless said otherwise."""
    params = SamplingParams(**{"max_new_tokens": 40, **sampling})
    return GenerationRequest(request_id, [*prompt, *resumed], params, len(resumed), routed, top_token_ids=top)


def alike(responses: Mapping[str, Generated]) -> dict[str, Any]:
    """What has to be the same with drafts and without, by request."""
    return {name: response.alike() for name, response in responses.items()}


def futures(responses: Mapping[str, Generated]) -> dict[str, Sequence[int]]:
    """The responses as an oracle knows them."""
    return {name: response.tokens for name, response in responses.items()}
