"""Notes on what is loaded at the start."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.notes.registry import Note, noted
from miles.config.schema.flat_settings import FlatSettings

_OF_WEIGHTS_ALONE = ("finetune", "no_load_optim", "no_load_rng")


@noted
def references_are_for_a_kl_term(s: FlatSettings) -> Iterator[Note]:
    if s.given("ref_load") and s.ref_load != s.hf_checkpoint and not (s.use_kl_loss or s.kl_coef):
        text = "without use_kl_loss and kl_coef no reference is held; the policy starts from it if it is torch_dist"
        yield Note("ref_load", s.ref_load, text)


@noted
def weights_are_loaded_alone(s: FlatSettings) -> Iterator[Note]:
    for key in _OF_WEIGHTS_ALONE:
        if getattr(s, key):
            text = "it changes nothing: a first start takes weights alone, a run's own checkpoints are resumed whole"
            yield Note(key, True, text)
