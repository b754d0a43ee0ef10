"""Notes on the trainer's passes and conversions."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.notes.registry import Note, noted
from miles.config.schema.flat_settings import FlatSettings


@noted
def one_converter_whatever_the_mode(s: FlatSettings) -> Iterator[Note]:
    if s.given("megatron_to_hf_mode"):
        text = "it changes nothing: megatron-bridge converts the weights, in either mode"
        yield Note("megatron_to_hf_mode", s.megatron_to_hf_mode, text)


@noted
def no_pass_to_skip(s: FlatSettings) -> Iterator[Note]:
    if s.skip_actor_forward_only:
        text = "it changes nothing: with one optimizer step per rollout the training pass gives old log-probabilities"
        yield Note("skip_actor_forward_only", True, text)
