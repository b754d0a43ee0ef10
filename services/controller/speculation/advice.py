"""What to turn when drafts are not accepted, by what the engines draft with."""

from __future__ import annotations

import dataclasses

from miles.config.speculation import DraftKind, Speculation

_OFF = "leave sglang_speculative_algorithm out"
_TRAINABLE = (DraftKind.EAGLE3, DraftKind.STANDALONE)


@dataclasses.dataclass(frozen=True, slots=True)
class DraftSetup:
    """What the engines of a run draft with."""

    speculation: Speculation
    trained: bool
    """Whether the draft is trained while the policy moves."""

    @property
    def has_model(self) -> bool:
        """Whether drafts come from a model, which the policy can move away from."""
        return self.speculation.kind not in (DraftKind.NONE, DraftKind.NGRAM)


def against_low_acceptance(setup: DraftSetup) -> str:
    """What to do when next to nothing is accepted."""
    speculation = setup.speculation
    match speculation.kind:
        case DraftKind.NGRAM:
            return f"Responses repeat too little: keep more of them (draft_responses_per_prompt), or {_OFF}"
        case DraftKind.MTP if setup.trained:
            return f"The MTP layers do not learn (train/mtp_loss): raise mtp_loss_scaling_factor, or {_OFF}"
        case DraftKind.MTP:
            return f"The MTP layers may not belong to these weights: train them (enable_mtp_training), or {_OFF}"
        case _ if setup.trained:
            return (
                "The draft does not learn (draft/loss): raise draft_learning_rate or draft_passes, draft with "
                f"sglang_speculative_algorithm NGRAM, or {_OFF}"
            )
        case kind:
            path = speculation.draft_model_path
            wrong = f"{path} may be made for another model or tokenizer" if path else "The draft may be a wrong one"
            train = "train it (enable_draft_training), " if kind in _TRAINABLE else ""
            return f"{wrong}: take another, {train}draft with sglang_speculative_algorithm NGRAM, or {_OFF}"


def against_drift(setup: DraftSetup) -> str:
    """What to do when less and less is accepted."""
    if setup.trained and setup.speculation.kind is DraftKind.MTP:
        return "The MTP layers follow too slowly: raise mtp_loss_scaling_factor"
    if setup.trained:
        return (
            "The draft follows too slowly: raise draft_learning_rate, draft_passes or draft_tokens_per_step, and lower "
            "draft_update_interval; draft/missed_recordings counts steps that it had no time for"
        )
    fewer = "draft fewer steps (sglang_speculative_num_steps)"
    match setup.speculation.kind:
        case DraftKind.MTP:
            return f"The MTP layers stand still while the policy moves: train them (enable_mtp_training), or {fewer}"
        case kind if kind in _TRAINABLE:
            return f"The draft stands still while the policy moves: train it (enable_draft_training), or {fewer}"
        case _:
            return f"The draft stands still while the policy moves: {fewer}, or draft with EAGLE3 and train it"
