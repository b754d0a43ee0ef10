"""A job's teachers behind servers: which one scores a sample, and what it is asked for."""

from __future__ import annotations

import asyncio
import logging
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from miles.distillation.token_choice import STUDENTS, TEACHERS, choose_tokens, pick
from miles.services.rollout.teachers.prompt_scores import likeliest_tokens, score_response, score_tokens
from miles.services.rollout.teachers.server import TeacherRefused, TeacherServer
from miles.telemetry.tracing import traced
from miles.types import Sample

if TYPE_CHECKING:
    from miles.config.sections.distillation import DistillationConfig

log = logging.getLogger(__name__)

PROBE = "Step 1: f(x) = 2x² + 3; naïve 数学 — done.\n\tif x > 10: return [x]"
"""Text that tokenizers differ in."""


class ServedTeachers:
    """Asks the teachers of a job; `open` first."""

    def __init__(self, config: DistillationConfig) -> None:
        """Raises OSError when the file with the key cannot be read."""
        self._config = config
        path = config.opd_teacher_key_file
        key = None if path is None else pathlib.Path(path).read_text(encoding="utf-8").strip()
        self.servers = {
            name: TeacherServer(name, url, key, config.opd_teacher_timeout_s)
            for name, url in config.teacher_urls.items()
        }

    async def open(self) -> None:
        """Open the connection pools."""
        for server in self.servers.values():
            await server.open()

    async def close(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(server.close() for server in self.servers.values()))

    async def check(self, probe_ids: Sequence[int]) -> None:
        """Wait until every server answers, and compare how it tokenises `PROBE`.

        Raises TeacherFailed when one does not answer in time, and TeacherRefused for one with other tokens. Servers
        that tokenise nothing are believed.
        """
        await asyncio.gather(*(self._check(server, probe_ids) for server in self.servers.values()))

    async def _check(self, server: TeacherServer, probe_ids: Sequence[int]) -> None:
        asked = {"prompt": PROBE, "add_special_tokens": False}
        try:
            answer = await server.ask("POST", server.sibling("/tokenize"), asked)
        except TeacherRefused as error:
            log.info("the tokenizer of %s is not compared: %s", server, error)
            return
        tokens = answer.get("tokens")
        if isinstance(tokens, list) and tokens != list(probe_ids):
            raise TeacherRefused(
                f"{server} has another tokenizer than the policy: it makes {tokens[:8]}… of a text of which the "
                f"policy's makes {list(probe_ids)[:8]}…; serve a teacher with the policy's tokenizer"
            )

    def is_scored(self, sample: Sample) -> bool:
        """Whether a sample has what the trainer needs of its teacher."""
        if self._config.opd_log_prob_top_k:
            return sample.teacher_token_log_probs is not None
        return sample.teacher_log_probs is not None

    @traced("teacher")
    async def score(self, sample: Sample) -> None:
        """Put into the sample what its teacher says. Raises TeacherFailed, and ValueError where no other try helps."""
        server = self.servers[self._config.teacher_of(sample.metadata)]
        if not self._config.opd_log_prob_top_k:
            sample.teacher_log_probs = await score_response(server, sample)
            return
        ids, log_probs = await self._score_sets(server, sample)
        sample.teacher_tokens, sample.teacher_token_log_probs = ids, log_probs

    async def _score_sets(self, server: TeacherServer, sample: Sample) -> tuple[Any, Any]:
        strategy, count = self._config.opd_top_k_strategy, self._config.opd_log_prob_top_k
        own = others = others_log_probs = None
        if strategy in STUDENTS:
            own = self._own_likeliest(sample, count)
        if strategy in TEACHERS:
            others, others_log_probs = await likeliest_tokens(server, sample, count)
        ids = choose_tokens(strategy, own, others)
        if others is None or others_log_probs is None:
            return ids, await score_tokens(server, sample, ids)
        known = pick(ids, others, others_log_probs)
        unknown = np.isnan(known)
        if not unknown.any():
            return ids, known
        asked = await score_tokens(server, sample, np.where(unknown, ids, np.int32(-1)))
        return ids, np.where(unknown, asked, known)

    def _own_likeliest(self, sample: Sample, count: int) -> Any:
        """What the engine reported: the policy's likeliest tokens, int32 [R, K]."""
        if not sample.response_length:
            return np.zeros((0, count), np.int32)
        own = sample.teacher_tokens
        if own is None or len(own) != sample.response_length:
            there = 0 if own is None else len(own)
            raise ValueError(
                f"the engine reported likeliest tokens at {there} of the {sample.response_length} positions of sample "
                f"{sample.index}; opd_top_k_strategy = only-teacher needs none"
            )
        return own
