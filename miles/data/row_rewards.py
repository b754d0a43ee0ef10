"""Whether the reward that a row asks for can score it, checked when the row is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from miles.answers.labels import label_fault
from miles.config.sections.reward import BuiltinReward
from miles.data.errors import DataError
from miles.reward_names import DEFAULT_SERVICE, REWARD_KEY, SERVICE_KEY

if TYPE_CHECKING:
    from miles.config.sections.reward import RewardConfig
    from miles.data.prompt_fields import PromptRow


def check_reward(row: PromptRow, config: RewardConfig, *, optional: bool = False) -> None:
    """Raise DataError for a row that no reward can score: an unknown service or reward, or a label it cannot read.

    What a service of the user's wants of a row is not known here. With `optional`, a row needs none.
    """
    if optional and not config.scores(row.metadata):
        return
    service = config.service_of(row.metadata)
    addresses = config.addresses_with_default()
    known = [*([DEFAULT_SERVICE] if config.scored_here else []), *addresses]
    if service not in known:
        _refuse_service(row, service, known)
    if service in addresses or config.custom_rm_path is not None:
        return
    chosen = row.metadata.get(REWARD_KEY, config.rm_type)
    if chosen is None:
        raise DataError(
            f"no reward scores it: its metadata has no {REWARD_KEY}, and there is no default; set --rm-type"
        )
    if not isinstance(chosen, str) or chosen not in get_args(BuiltinReward):
        names = ", ".join(get_args(BuiltinReward))
        raise DataError(
            f"its metadata has {REWARD_KEY} {chosen!r:.100}, which is no built-in reward; there are {names}"
        )
    if fault := label_fault(chosen, row.label):
        raise DataError(fault)


def _refuse_service(row: PromptRow, service: str, known: list[str]) -> None:
    if SERVICE_KEY in row.metadata:
        problem = f"its metadata names the {SERVICE_KEY} {service!r}, which is none of {', '.join(known)}"
        raise DataError(f"{problem}; add --reward-service {service}=HOST:PORT")
    raise DataError(
        f"no reward scores it: its metadata names no {SERVICE_KEY}, and none of {', '.join(known)} is the default; "
        f"name a service in the row's metadata, call one {DEFAULT_SERVICE}, or set --rm-type or --custom-rm-path"
    )
