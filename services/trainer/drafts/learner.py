"""Training of a draft model on recorded samples: batches, optimizer, state, and what engines get of it."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from miles.config.speculation import DraftKind, speculation_of
from miles.drafts.eagle3_training import TrainableHead
from miles.drafts.recorded_layers import aux_layers
from miles.drafts.recording import RecordedSample
from miles.drafts.trainable import PassResult, Trainable
from miles.services.trainer.drafts.language_model import TrainableLanguageModel
from miles.weights.hf_folder.model_config import read_model_config

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.weights.publisher import Layout

_BETAS = (0.9, 0.95)
"""Of AdamW, as in EAGLE-3's own training."""
_MAX_NORM = 1.0
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEPS = "optimizer_steps"
_OF_EVERY_PASS = ("grad_norm", "tokens")


@dataclasses.dataclass(frozen=True, slots=True)
class LearnerOptions:
    """How a draft model is trained; the fields mean what the settings `draft_…` of their names say."""

    learning_rate: float
    batch_tokens: int
    passes: int
    dtype: torch.dtype
    """Type of published weights."""


def create_learner(config: JobConfig, folder: pathlib.Path, device: torch.device) -> DraftLearner:
    """The learner of a job's draft model, which begins as what the folder holds.

    Raises ValueError when the folder's model cannot be trained, or not with this policy.
    """
    drafts = config.drafts
    speculation = speculation_of(config.rollout.sglang_args)
    policy = read_model_config(str(config.rollout.hf_checkpoint)).get_text_config()
    how: dict[str, Any] = {"loss": drafts.draft_loss, "device": device}
    how["temperature"] = config.rollout.rollout_temperature
    model: Trainable
    if speculation.kind is DraftKind.STANDALONE:
        model = TrainableLanguageModel(folder, int(policy.vocab_size), steps=speculation.num_steps, **how)
    else:
        layers = aux_layers(str(folder), int(policy.num_hidden_layers))
        model = TrainableHead(folder, layers, unroll_steps=drafts.draft_unroll_steps, **how)
    dtype = getattr(torch, config.rollout.rollout_dtype)
    options = LearnerOptions(drafts.draft_learning_rate, drafts.draft_batch_tokens, drafts.draft_passes, dtype)
    return DraftLearner(model, options)


class DraftLearner:
    """A draft model and its optimizer. Not for several threads."""

    def __init__(self, model: Trainable, options: LearnerOptions) -> None:
        self._model, self._options = model, options
        self._parameters = {name: each for name, each in model.module.named_parameters() if each.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=options.learning_rate, betas=_BETAS, weight_decay=0.0, fused=True
        )
        self.optimizer_steps = 0

    def learn(self, samples: Sequence[RecordedSample]) -> Iterator[Mapping[str, float]]:
        """Learn from samples, with an optimizer step at each `next()`.

        Yields of its batch `grad_norm` and `tokens`, and in the first pass, whose samples are new to the draft as the
        next rollout's will be: `loss` in nats, `agreement` (share of tokens of which the draft's likeliest is the
        policy's) and `accept_length` (tokens of a verification, the policy's own included, with the drafts of a chain).
        """
        samples = [sample for sample in samples if self._model.usable(sample)]
        for number in range(self._options.passes if samples else 0):
            generator = torch.Generator().manual_seed(self.optimizer_steps)
            order = torch.randperm(len(samples), generator=generator).tolist()
            for batch in batches([samples[i] for i in order], self._options.batch_tokens):
                metrics = self._step(batch)
                yield metrics if number == 0 else {name: metrics[name] for name in _OF_EVERY_PASS}

    def layout(self) -> Layout:
        """Name, type and shape of what `export` gives."""
        return [
            (self._model.published_name(name), self._options.dtype, tuple(each.shape))
            for name, each in self._parameters.items()
        ]

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as engines load them: tied ones once, and no embeddings of a head, which are the policy's."""
        for name, each in self._parameters.items():
            yield self._model.published_name(name), each.detach().to(self._options.dtype)

    def save(self, folder: pathlib.Path) -> None:
        """Write the model as it is now as a folder from which an engine or another run can start."""
        self._model.save(folder, self._options.dtype)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, moments and counts, from which `load_state` goes on as if nothing had happened."""
        found = {f"weight.{name}": each.detach() for name, each in self._parameters.items()}
        for name, each in self._parameters.items():
            held = self._optimizer.state.get(each) or {kind: torch.zeros_like(each) for kind in _MOMENTS}
            found |= {f"{kind}.{name}": held[kind] for kind in _MOMENTS}
        return {**found, _STEPS: torch.tensor(self.optimizer_steps)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take what `state` gave. Raises ValueError, before anything changed, when it is of another model."""
        expected = self.state()
        for name in expected.keys() | state.keys():
            if name not in expected or name not in state or expected[name].shape != state[name].shape:
                shapes = [tuple(each[name].shape) if name in each else "missing" for each in (state, expected)]
                raise ValueError(f"the state is of another draft model: {name} is {shapes[0]}, here {shapes[1]}")
        self.optimizer_steps = int(state[_STEPS])
        for name, each in self._parameters.items():
            each.data.copy_(state[f"weight.{name}"])
            moments = {kind: state[f"{kind}.{name}"].to(each.device, copy=True) for kind in _MOMENTS}
            if self.optimizer_steps:
                step = torch.tensor(float(self.optimizer_steps), device=each.device)
                self._optimizer.state[each] = {"step": step, **moments}

    def move(self, device: torch.device) -> None:
        """Move weights and moments to a device; allowed between two steps."""
        self._model.module.to(device)
        for held in self._optimizer.state.values():
            for kind, tensor in held.items():
                held[kind] = tensor.to(device)
        if device.type == "cpu" and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _step(self, samples: Sequence[RecordedSample]) -> dict[str, float]:
        self._optimizer.zero_grad()
        result = self._model.learn_from(samples)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), _MAX_NORM)
        metrics = _metrics(result, norm)
        if math.isfinite(metrics["grad_norm"]):
            self._optimizer.step()
            self.optimizer_steps += 1
        self._optimizer.zero_grad()
        return metrics


def batches(samples: Sequence[RecordedSample], tokens: int) -> Iterator[list[RecordedSample]]:
    """Deal samples out, in order, to batches of about the same number of tokens, at most `tokens` where that goes."""
    total = sum(len(sample.tokens_T) for sample in samples)
    size = total / math.ceil(total / tokens)
    batch: list[RecordedSample] = []
    dealt = given = 0
    for sample in samples:
        if batch and dealt + len(sample.tokens_T) / 2 > (given + 1) * size:
            yield batch
            batch, given = [], given + 1
        batch.append(sample)
        dealt += len(sample.tokens_T)
    if batch:
        yield batch


def _metrics(result: PassResult, norm: torch.Tensor) -> dict[str, float]:
    """Waits for the device, once in an optimizer step."""
    loss, agreed, chains, grad_norm = torch.stack([result.loss, result.agreed, result.chains, norm]).tolist()
    tokens = max(result.tokens, 1)
    found = {"loss": loss, "agreement": agreed / tokens, "tokens": float(result.tokens), "grad_norm": grad_norm}
    return {**found, "accept_length": chains / result.roots} if result.roots else found
