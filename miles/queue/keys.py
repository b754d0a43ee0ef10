"""Names of all Redis keys of the queue; each starts with the job's prefix."""

from __future__ import annotations

import dataclasses
import re

CONSUMER_GROUP = "trainer"
"""The one consumer group of a job's stream."""

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclasses.dataclass(frozen=True, slots=True)
class JobKeys:
    """The keys of one job.

    Raises ValueError for a job id that could collide with another job's keys or act as a pattern.
    """

    job_id: str

    def __post_init__(self) -> None:
        if not _JOB_ID.fullmatch(self.job_id):
            raise ValueError(
                f"job_id = {self.job_id!r} cannot name Redis keys; use 1 to 128 letters, digits, '_', '.' or '-', "
                "beginning with a letter or digit"
            )

    @property
    def prefix(self) -> str:
        """What every key of the job starts with."""
        return f"miles:{self.job_id}:"

    @property
    def groups(self) -> str:
        """Stream of finished groups, one entry a group."""
        return f"{self.prefix}groups"

    @property
    def index(self) -> str:
        """Hash from group id to an `Outstanding` record: which entries exist, without their payloads."""
        return f"{self.prefix}group_index"

    @property
    def blob_refs(self) -> str:
        """Hash from the name of a blob to the number of entries that refer to it."""
        return f"{self.prefix}blob_refs"

    @property
    def blob_prefix(self) -> str:
        """What the keys of a blob start with; `blobs` says what follows."""
        return f"{self.prefix}blob:"

    @property
    def dropped(self) -> str:
        """Hash from the id of a dropped group to the reason."""
        return f"{self.prefix}group_dropped"

    @property
    def fences(self) -> str:
        """Hash from worker id, or `*` for all workers, to the smallest lease number whose results are accepted."""
        return f"{self.prefix}fences"

    @property
    def lives(self) -> str:
        """Counter of the controller processes that took up the job."""
        return f"{self.prefix}lives"

    @property
    def dead(self) -> str:
        """Stream of entries that could not be decoded, with the reason."""
        return f"{self.prefix}dead"

    @property
    def lasting(self) -> tuple[str, ...]:
        """Every key without a time to live of its own while the job has not ended; `lives` first."""
        return (self.lives, self.groups, self.index, self.blob_refs, self.dead, self.dropped, self.fences)

    @property
    def partial_prefix(self) -> str:
        """What the key of a half-finished group starts with; its group id follows."""
        return f"{self.prefix}partial:"

    def partial(self, group_id: int) -> str:
        """Hash that holds a half-finished group and the attempt that stored it."""
        return f"{self.partial_prefix}{group_id}"

    @property
    def responses_prefix(self) -> str:
        """What the key of the responses to a prompt starts with; the hash of the prompt's tokens follows."""
        return f"{self.prefix}responses:"

    def responses(self, prompt: str) -> str:
        """List of the newest responses to a prompt, the newest first."""
        return f"{self.responses_prefix}{prompt}"

    @property
    def response_ages(self) -> str:
        """Sorted set of the prompts that have responses, by the Unix time of the last one, in seconds."""
        return f"{self.prefix}response_ages"

    @property
    def response_sizes(self) -> str:
        """Hash from a prompt to the bytes of its responses; the total is under the empty name."""
        return f"{self.prefix}response_sizes"
