"""The built-in rewards by name."""

from __future__ import annotations

from miles.reward_sdk import Source

BUILTIN: dict[str, str] = {
    "exact_match": "miles.services.reward.exact_match.exact_match",
    "last_number": "miles.services.reward.last_number.last_number",
    "math": "miles.services.reward.math_answer.math_answer",
    "deepscaler": "miles.services.reward.deepscaler.deepscaler",
    "dapo": "miles.services.reward.dapo.dapo",
}
"""The dotted path of each. Only worker processes import them, so a service without mathematics needs no math-verify."""


def sources(rewards: list[str], custom_rm_path: str | None, group_rm: bool) -> list[Source]:
    """The functions that a service with these flags serves. The custom one is first, which makes it the default.

    Raises ValueError for a name that is not a built-in reward.
    """
    unknown = [name for name in rewards if name not in BUILTIN]
    if unknown:
        raise ValueError(f"no built-in reward is named {', '.join(unknown)}; there are {', '.join(BUILTIN)}")
    custom = [Source(custom_rm_path, group=group_rm)] if custom_rm_path else []
    return custom + [Source(BUILTIN[name], name=name) for name in rewards]
