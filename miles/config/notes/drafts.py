"""Notes on what trains the draft model, from what, and where."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from miles.config.notes.registry import Note, noted
from miles.config.schema.flat_settings import FlatSettings
from miles.config.speculation import DraftKind, speculation_of
from miles.drafts.folders import initial_dir


@noted
def what_trains_the_draft(s: FlatSettings) -> Iterator[Note]:
    if not s.enable_draft_training:
        return
    speculation = speculation_of(s.sglang_args)
    origin = speculation.draft_model_path
    what = "an EAGLE-3 head" if speculation.kind is DraftKind.EAGLE3 else "a small language model"
    if origin == str(initial_dir(pathlib.Path(s.run_dir))):
        begins = f"begins from nothing, in {origin}: until it has learned, most drafts are rejected"
    else:
        begins = f"begins as {origin}"
    loss = {"kl": "the policy's likeliest tokens", "ce": "the tokens that were sampled"}[s.draft_loss]
    yield Note(
        "enable_draft_training",
        True,
        f"draft-trainer-0 trains {what}, which {begins}; it learns {loss}, from up to {s.draft_tokens_per_step} tokens "
        f"of each training step as the policy's forward pass saw them, and engines get a new version after every "
        f"{'one' if s.draft_update_interval == 1 else s.draft_update_interval} that it has learned from",
    )


@noted
def where_the_draft_is_trained(s: FlatSettings) -> Iterator[Note]:
    if not s.enable_draft_training or s.device != "cuda":
        return
    if s.draft_train_device == "cpu":
        yield Note("draft_train_device", "cpu", "the draft is trained on this machine's CPU, beside the run")
    elif _in_turns(s):
        text = "the draft is trained in the engines' turn, and leaves its GPU for the trainer's"
        yield Note("draft_train_device", s.draft_train_device, text)
    else:
        text = "the draft is trained beside what has that GPU: leave it memory, by sglang_mem_fraction_static for one"
        yield Note("draft_train_device", s.draft_train_device, text)


def _in_turns(s: FlatSettings) -> bool:
    """Whether trainer and engines take turns: what the controller's `GpuTurns.taken` says of a trainer with GPUs."""
    asked = s.offload_train
    return bool(s.offload_rollout or (s.colocate and not s.fsdp_cpu_offload if asked is None else asked))
