"""Schemas of speculative decoding in the REST API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from miles.rpc.gen import controller_pb2, rollout_pb2
from miles.telemetry.redaction import redact


class VersionAcceptance(BaseModel):
    """What became of the drafts that one version of the draft model proposed to one version of the policy."""

    policy_version: int
    draft_version: int | None = Field(
        default=None, description="Null for drafts without weights of their own, and before the first version"
    )
    verifications: int = Field(description="Forward passes times the requests in them that had drafts")
    proposed: int = Field(description="Draft tokens proposed")
    accepted: int = Field(description="Draft tokens accepted")
    accept_length: float | None = Field(
        default=None, description="Mean tokens per verification: 1 + accepted / verifications", examples=[2.4]
    )
    accept_rate: float | None = Field(default=None, description="Accepted / proposed", examples=[0.47])


class EngineSpeculation(BaseModel):
    """How an engine drafts."""

    engine: str = Field(examples=["rollout-0"])
    draft_version: int | None = Field(
        default=None, description="Version of the draft model that it serves; null when it has none"
    )
    num_steps: int = Field(
        description="Most tokens drafted one behind the other now; 0 while drafts are turned off, and of a lost engine"
    )
    reason: str | None = Field(default=None, description="Why drafts are turned off or cut short")
    speedup: float | None = Field(
        default=None, description="Tokens per second with drafts over those without, at the present batch size"
    )
    acceptance: list[VersionAcceptance] = Field(
        description="Since the run began, by pair of versions: the newest pairs, oldest first"
    )


def engine_speculation(engine: controller_pb2.EngineSpeculation) -> EngineSpeculation:
    """Convert an engine's speculation to its schema."""
    progress = engine.progress
    return EngineSpeculation(
        engine=engine.worker_id,
        draft_version=progress.draft_version if progress.HasField("draft_version") else None,
        num_steps=progress.num_steps,
        reason=redact(progress.reason) or None,
        speedup=progress.speedup or None,
        acceptance=[_acceptance(counts) for counts in progress.counts],
    )


def recorded_acceptance(summary: Mapping[str, Any]) -> list[VersionAcceptance]:
    """Return what a job's summary has of all its engines; empty without speculative decoding."""
    return [VersionAcceptance(**each) for each in summary.get("acceptance", ())]


def _acceptance(counts: rollout_pb2.SpeculationCounts) -> VersionAcceptance:
    verifications, proposed, accepted = (
        counts.verify_count,
        counts.proposed_draft_tokens,
        counts.accepted_draft_tokens,
    )
    return VersionAcceptance(
        policy_version=counts.policy_version,
        draft_version=counts.draft_version if counts.HasField("draft_version") else None,
        verifications=verifications,
        proposed=proposed,
        accepted=accepted,
        accept_length=1 + accepted / verifications if verifications else None,
        accept_rate=accepted / proposed if proposed else None,
    )
