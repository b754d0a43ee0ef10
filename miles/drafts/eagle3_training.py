"""An EAGLE-3 head of a folder, to be trained."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from miles.config.checks.json_file import read_json_object
from miles.drafts import packed_batch
from miles.drafts.eagle3 import Eagle3Head
from miles.drafts.folder import module_name, read_tensors, write_draft
from miles.drafts.losses import loss_at
from miles.drafts.recording import RecordedSample
from miles.drafts.trainable import PassResult
from miles.drafts.unrolling import learn_from
from miles.drafts.vocabulary import read_vocabulary


class TrainableHead:
    """An EAGLE-3 head; implements `Trainable`.

    Args:
        folder: The head, its configuration and weights.
        layers: Keys of the policy's hidden states in samples, in the order in which the head reads them.
        loss: "kl" or "ce".
        unroll_steps: Steps of training-time test.
        temperature: At which the policy samples.

    Raises ValueError for a folder that holds no such head, or another number of layers than it reads.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        layers: Sequence[int],
        *,
        loss: str,
        unroll_steps: int,
        device: torch.device,
        temperature: float = 1.0,
    ) -> None:
        self._config = read_json_object(folder / "config.json")
        stored = read_tensors(folder)
        self._head, self._names = load_head(self._config, stored, torch.float32)
        self._head.to(device)
        if self._head.fc.in_features != len(layers) * self._head.fc.out_features:
            raise ValueError(
                f"{folder} reads {self._head.fc.in_features // self._head.fc.out_features} hidden states, and those of "
                f"{len(layers)} layers are recorded"
            )
        self._vocabulary = read_vocabulary(stored, self._head.lm_head.out_features, int(self._head.config.vocab_size))
        self._layers, self._loss, self._steps = tuple(layers), loss_at(loss, temperature), unroll_steps

    @property
    def module(self) -> torch.nn.Module:
        """The head."""
        return self._head

    def usable(self, sample: RecordedSample) -> bool:
        """Whether it has tokens to predict, and enough to read."""
        return packed_batch.usable(sample)

    def learn_from(self, samples: Sequence[RecordedSample]) -> PassResult:
        """Add the gradients of the mean loss over usable samples to the parameters'."""
        device = self._head.fc.weight.device
        batch = packed_batch.pack(samples, self._layers, self._steps, device)
        if self._vocabulary.ids_V.device != device:
            self._vocabulary = self._vocabulary.to(device)
        with computing_on(device):
            return learn_from(self._head, batch, self._vocabulary, self._loss, self._steps)

    def published_name(self, parameter: str) -> str:
        """The name that it has in the folder from which engines started."""
        return self._names[parameter]

    def save(self, folder: pathlib.Path, dtype: torch.dtype) -> None:
        """Write it as a folder that an engine can start from, in place of one that is there."""
        tensors = {self._names[name]: each.to(dtype) for name, each in self._head.state_dict().items()}
        config = {**self._config, "dtype": str(dtype).removeprefix("torch.")}
        write_draft(folder, config, {**tensors, **self._vocabulary.tensors()})


def load_head(
    config: dict[str, Any], stored: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[Eagle3Head, dict[str, str]]:
    """A head with the weights of its folder, and the names that these have there, by those of its parameters.

    Raises ValueError for a head of another form, and for weights that are missing or of another shape.
    """
    head = Eagle3Head(config, dtype)
    names = {module_name(name): name for name in stored}
    faults = []
    for name, parameter in head.named_parameters():
        found = stored[names[name]] if name in names else None
        if found is None or found.shape != parameter.shape:
            has = "missing" if found is None else f"of shape {tuple(found.shape)}"
            faults.append(f"{name} is {has}, the configuration's has shape {tuple(parameter.shape)}")
    if faults:
        raise ValueError(f"weights of the EAGLE-3 head do not fit: {'; '.join(faults)}")
    used = {name: names[name] for name, _ in head.named_parameters()}
    head.load_state_dict({name: stored[given].to(dtype) for name, given in used.items()}, assign=True)
    return head, used


def computing_on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Products in bfloat16 on a GPU, in float32 on a CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()
