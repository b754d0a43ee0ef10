"""On-policy distillation: where teachers are, and what is taken from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from miles.config.schema.section import Metavar, NonNegative, NonNegativeFloat, PositiveFloat, Section, States

DEFAULT_TEACHER = "default"
"""The teacher of samples that name none, or one that is not known."""
ENGINE_CHOOSES = ("only-student", "intersection", "union", "xor")
"""Strategies whose sets have the policy's likeliest tokens."""
_NAMED = re.compile(r"([\w.-]+)=(.+)")

TopKStrategy = Literal["only-student", "only-teacher", "intersection", "union", "xor"]
WeightMode = Literal["student_p", "teacher_p", "none"]


class DistillationConfig(Section):
    """On-policy distillation (OPD); docs/distillation.md has the formulas."""

    use_opd: bool = False
    """On-policy distillation: subtract the reverse KL divergence to a teacher from the advantages. Rows that name no
    reward need none."""

    opd_type: Literal["sglang", "megatron"] | None = None
    """Where the teacher runs: in SGLang servers, which the rollout services ask (sglang), or in the trainer, with
    either backend (megatron)."""

    opd_kl_coef: NonNegativeFloat = 1.0
    """Coefficient of the KL divergence to the teacher (use_opd)."""

    opd_log_prob_top_k: NonNegative = 0
    """Number of likeliest tokens at each position over which the KL divergence is summed; 0 takes the sampled token
    alone."""

    opd_top_k_strategy: TopKStrategy = "only-student"
    """Tokens that opd_log_prob_top_k sums over: the policy's likeliest, the teacher's, those of both (intersection), of
    either (union), or of only one of them (xor)."""

    opd_reward_weight_mode: WeightMode = "student_p"
    """Weight of each of those tokens: the policy's probability, the teacher's, or the same for all (none)."""

    opd_topk_per_position: Annotated[
        bool, States(False, "servers are asked in pieces of a few positions, which no SGLang has to be patched for")
    ] = False
    """Ask a patched SGLang for other tokens at each position."""

    opd_teacher_urls: Annotated[tuple[str, ...] | None, Metavar("NAME=URL ...")] = None
    """SGLang servers with several teachers (opd_type sglang), as NAME=http://HOST:PORT/generate; the one named default
    teaches samples that name none of them."""

    opd_teacher_key: str = "opd_teacher"
    """Key of a row's metadata that names its teacher."""

    opd_teacher_load: Annotated[tuple[str, ...] | None, Metavar("[NAME=]DIR ...")] = None
    """Hugging Face folder of the teacher in the trainer (opd_type megatron), which must have the policy's vocabulary,
    and with train_backend megatron also its shape; several as NAME=DIR, where default is as in opd_teacher_urls."""

    opd_teacher_key_file: Annotated[str | None, Metavar("FILE")] = None
    """File with the API key of the teacher's servers (opd_type sglang)."""

    opd_teacher_timeout_s: PositiveFloat = 600.0
    """How long a sample waits for its teacher's server (opd_type sglang), in seconds; then its group is generated
    again."""

    rm_url: Annotated[str | None, Metavar("URL")] = None
    """URL of the only teacher (opd_type sglang), as in opd_teacher_urls."""

    @property
    def teacher_folders(self) -> dict[str, str]:
        """The folder of each teacher in the trainer, by name."""
        return named(self.opd_teacher_load or ()) if self.use_opd else {}

    @property
    def teacher_urls(self) -> dict[str, str]:
        """The URL of each teacher's server, by name."""
        if not self.use_opd or self.opd_type != "sglang":
            return {}
        return named(self.opd_teacher_urls or ([] if self.rm_url is None else [self.rm_url]))

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Names of all teachers; one that has no name is called default."""
        return tuple(self.teacher_folders or self.teacher_urls)

    @property
    def engine_top_k(self) -> int:
        """How many of the likeliest tokens engines report at each position, for servers to score."""
        served = self.use_opd and self.opd_type == "sglang" and self.opd_top_k_strategy in ENGINE_CHOOSES
        return self.opd_log_prob_top_k if served else 0

    @property
    def rewards_are_optional(self) -> bool:
        """Whether a sample without a reward learns all the same: from its teacher."""
        return self.use_opd and self.opd_kl_coef > 0

    def teacher_of(self, metadata: Mapping[str, Any]) -> str:
        """The name of a sample's teacher. Raises ValueError where none is meant by its metadata."""
        names, chosen = self.teacher_names, metadata.get(self.opd_teacher_key)
        if chosen is not None and str(chosen) in names:
            return str(chosen)
        if DEFAULT_TEACHER in names:
            return DEFAULT_TEACHER
        said = "names no" if chosen is None else f"names {chosen!r:.100} as"
        raise ValueError(
            f"its metadata {said} {self.opd_teacher_key}; there are {', '.join(names)}, and none is called default"
        )


def named(values: Iterable[str]) -> dict[str, str]:
    """Split [NAME=]VALUE into names and values; a value without a name is the default's."""
    return dict(split_name(value) for value in values)


def split_name(value: str) -> tuple[str, str]:
    """Split one [NAME=]VALUE. A URL or a path that has = behind other signs than those of names has no name."""
    match = _NAMED.fullmatch(value)
    return (match[1], match[2]) if match else (DEFAULT_TEACHER, value)
