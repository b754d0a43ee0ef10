"""Drafts of speculative decoding: training them beside the policy, and earlier responses as drafts."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Derived, Metavar, NonNegative, Positive, PositiveFloat, Section, derived


class DraftsConfig(Section):
    """What keeps drafts close to the policy (docs/speculation.md). What engines draft with is said by SGLang's own
    flags, --sglang-speculative-…, for any engine."""

    enable_draft_training: bool = False
    """Train the draft model of sglang_speculative_algorithm EAGLE3 or STANDALONE while the policy moves, in a service
    of its own, and bring each version of it to the engines. MTP layers are trained by enable_mtp_training instead."""

    draft_learning_rate: PositiveFloat = 1e-4
    """Learning rate of the draft model's AdamW."""

    draft_loss: Literal["kl", "ce"] = "kl"
    """Loss of the draft model: KL divergence from the policy's distribution, by its draft_top_tokens likeliest tokens
    (kl), or cross-entropy with the tokens that were sampled (ce)."""

    draft_top_tokens: Positive = 32
    """The policy's likeliest tokens whose probabilities the trainer records at each position of a response."""

    draft_tokens_per_step: Positive = 32768
    """Tokens of whole samples, prompts included, that the trainer records for the draft model in a training step."""

    draft_batch_tokens: Positive = 8192
    """Tokens of an optimizer step of the draft model."""

    draft_passes: Positive = 1
    """Passes over what was recorded in a training step."""

    draft_unroll_steps: Annotated[Positive, Derived("sglang_speculative_num_steps")] = derived()
    """Steps over which an EAGLE-3 head is trained on what it has drafted itself (training-time test)."""

    draft_update_interval: Positive = 1
    """Number of recorded training steps from one published version of the draft model to the next."""

    draft_recordings_kept: Positive = 2
    """Number of newest training steps whose recordings are kept for the draft trainer; older ones are dropped."""

    draft_recordings_dir: Annotated[str | None, Metavar("DIR")] = None
    """Folder of the recordings, which the ranks of the trainer and the draft trainer share; each run has its own below
    it, of its run folder's name. By default they are in the run's folder."""

    draft_train_device: Annotated[str, Metavar("DEVICE")] = "auto"
    """Device of the draft trainer: cpu, cuda, cuda:N, or auto, which is the last GPU of this machine, or its CPU."""

    draft_responses_per_prompt: Annotated[NonNegative, Derived("sglang_speculative_algorithm; 4 for NGRAM, else 0")] = (
        derived()
    )
    """Number of newest responses to each prompt, of all engines and epochs, that are kept in Redis as drafts for the
    next ones; 0 is none."""

    draft_acceptance_alarm: PositiveFloat = 1.05
    """Mean tokens per verification of a training step's responses at or below which an alarm says that the draft is
    wrong; 1 is a draft of which nothing is accepted."""
