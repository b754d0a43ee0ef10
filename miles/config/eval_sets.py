"""The data sets of an evaluation, each with its own settings: those of `eval_config`, or else of `eval_prompt_data`.

The file (YAML or JSON, or its text behind base64:) has `datasets`, a list or a mapping by name, and `defaults`, both
perhaps below a key `eval`. What neither a set nor the defaults say is as the settings of evaluation say.
"""

from __future__ import annotations

import base64
import binascii
import pathlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from miles.config.command.yaml_files import parse_yaml
from miles.config.schema.faults import ConfigError, Fault, faults_of
from miles.config.schema.section import NonNegative, NonNegativeFloat, Positive, Probability
from miles.reward_names import REWARD_KEY

INLINE = "base64:"
"""What a value begins with that is the file itself."""
READ = (
    *("eval_config", "eval_prompt_data", "eval_input_key", "eval_label_key", "tool_key", "metadata_key"),
    *("n_samples_per_eval_prompt", "eval_temperature", "eval_top_p", "eval_top_k", "eval_max_response_len"),
    *("eval_min_new_tokens", "rollout_stop", "rollout_stop_token_ids", "rollout_max_context_len", "custom_rm_path"),
)
"""Settings that evaluation sets depend on."""
_LOWEST_TEMPERATURE = 1e-3
_GROUP_SAMPLES = 1 << 16


class _Settings(BaseModel):
    """What a set, or the defaults of all, may say."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rm_type: str | None = None
    input_key: str | None = None
    label_key: str | None = None
    tool_key: str | None = None
    metadata_key: str | None = None
    n_samples_per_eval_prompt: Positive | None = None
    temperature: NonNegativeFloat | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    max_response_len: Positive | None = None
    min_new_tokens: NonNegative | None = None
    stop: tuple[str, ...] | None = Field(default=None, strict=False)
    stop_token_ids: tuple[NonNegative, ...] | None = Field(default=None, strict=False)
    metadata_overrides: dict[str, Any] | None = None


class _Row(_Settings):
    """One set of the file."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    path: Annotated[str, Field(min_length=1)]


class EvalSet(BaseModel):
    """One data set with everything that its evaluation depends on. Lengths are in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    path: str
    input_key: str
    label_key: str | None
    tool_key: str
    metadata_key: str
    n_samples: int
    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    """-1 means all tokens."""
    max_response_len: int | None
    min_new_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    metadata: dict[str, Any]
    """Added to that of each row; it may name the reward."""


def evaluates(s: Any) -> bool:
    """Return whether settings (one namespace) name data sets to evaluate on."""
    return bool(s.eval_prompt_data or s.eval_config)


def eval_sets(flat: Mapping[str, Any]) -> tuple[EvalSet, ...]:
    """Return the sets, by the settings that are `READ`. Raises ConfigError with every fault of the file."""
    if flat["eval_config"] is None:
        data = flat["eval_prompt_data"] or ()
        rows = (_Row.model_construct(name=name, path=path) for name, path in zip(data[::2], data[1::2], strict=False))
        return tuple(_complete(flat, row, _Settings()) for row in rows)  # rules report names that are at fault
    faults: list[Fault] = []
    defaults, listed = _read(flat["eval_config"], faults)
    if faults:
        raise ConfigError(faults)
    faults += _faults_together(flat, defaults, listed)
    if faults:
        raise ConfigError(faults)
    return tuple(_complete(flat, row, defaults) for row in listed)


def _read(value: str, faults: list[Fault]) -> tuple[_Settings, list[_Row]]:
    try:
        content = parse_yaml(_text(value))
    except OSError as error:
        faults.append(_fault(value, f"it cannot be read ({error.strerror})", "check the path"))
        return _Settings(), []
    except (yaml.YAMLError, ValueError) as error:
        faults.append(_fault(value, f"it is not YAML ({' '.join(str(error).split())})", "correct it"))
        return _Settings(), []
    content = content.get("eval", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not content.get("datasets"):
        faults.append(_fault(value, "it has no data sets", "list them, each with name and path, below datasets"))
        return _Settings(), []
    for key in content.keys() - {"datasets", "defaults"}:
        problem = f"its key {key} is for evaluation functions that read it themselves"
        faults.append(_fault(value, problem, "keep datasets and defaults alone"))
    defaults = _checked(_Settings, content.get("defaults") or {}, "defaults", value, faults)
    rows = [
        _checked(_Row, entry, where, value, faults) for where, entry in _entries(content["datasets"], value, faults)
    ]
    return defaults or _Settings(), [row for row in rows if row is not None]


def _text(value: str) -> str:
    if not value.startswith(INLINE):
        return pathlib.Path(value).read_text(encoding="utf-8")
    try:
        return base64.b64decode(value.removeprefix(INLINE), validate=True).decode()
    except binascii.Error as error:
        raise ValueError(f"what follows {INLINE} is not base64: {error}") from error


def _entries(datasets: Any, value: str, faults: list[Fault]) -> Iterator[tuple[str, Any]]:
    if isinstance(datasets, dict):
        for name, entry in datasets.items():
            yield f"datasets.{name}", {"name": name, **entry} if isinstance(entry, dict) else entry
    elif isinstance(datasets, list):
        for number, entry in enumerate(datasets):
            yield f"datasets[{number}]", entry
    else:
        faults.append(_fault(value, "its datasets are neither a list nor a mapping by name", "list them"))


def _checked(model: type[Any], entry: Any, where: str, value: str, faults: list[Fault]) -> Any:
    if not isinstance(entry, dict):
        faults.append(_fault(value, f"its {where} is no mapping", "write lines like name: aime"))
        return None
    try:
        return model(**entry)
    except ValidationError as error:
        for fault in faults_of(error):
            faults.append(_fault(value, f"{where}.{fault.field} = {fault.value!r}: {fault.problem}", fault.remedy))
    except TypeError:
        faults.append(_fault(value, f"its {where} has a key that is not text", "correct it"))
    return None


def _faults_together(flat: Mapping[str, Any], defaults: _Settings, rows: list[_Row]) -> Iterator[Fault]:
    value, names = flat["eval_config"], [row.name for row in rows]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield _fault(value, f"{name} names two data sets", "give each a name of its own")
    for row in rows:
        for problem, remedy in _faults_of_set(flat, row, _complete(flat, row, defaults)):
            yield _fault(value, f"{row.name}: {problem}", remedy)


def _faults_of_set(flat: Mapping[str, Any], row: _Row, each: EvalSet) -> Iterator[tuple[str, str]]:
    context, longest = flat["rollout_max_context_len"], each.max_response_len
    if each.top_k == 0:
        yield "top_k = 0 leaves no token to sample", "set it to -1 for all tokens, or to a count"
    if 0 < each.temperature < _LOWEST_TEMPERATURE:
        problem = f"logits divided by temperature = {each.temperature:g} lose the precision that sampling needs"
        yield problem, f"set it to 0 for greedy, or to {_LOWEST_TEMPERATURE:g} or more"
    if each.n_samples > _GROUP_SAMPLES:
        yield f"n_samples_per_eval_prompt = {each.n_samples}, and a group holds {_GROUP_SAMPLES} at most", "lower it"
    if row.max_response_len and context is not None and row.max_response_len >= context:
        problem = f"max_response_len = {longest} fills rollout_max_context_len = {context}"
        yield problem, "lower it, or raise rollout_max_context_len"
    if longest is not None and each.min_new_tokens > longest:
        yield f"min_new_tokens = {each.min_new_tokens} is above max_response_len = {longest}", "lower it"
    if REWARD_KEY in each.metadata and flat["custom_rm_path"]:
        problem = f"its rm_type has no effect, as custom_rm_path = {flat['custom_rm_path']} scores every sample"
        yield problem, "leave it out, or choose by the sample's metadata in that function"


def _complete(flat: Mapping[str, Any], row: _Row, defaults: _Settings) -> EvalSet:
    """Return a set with everything that it leaves to the defaults, and these to the settings."""

    def chosen(name: str, setting: str) -> Any:
        own = getattr(row, name)
        default = getattr(defaults, name) if own is None else own
        return flat[setting] if default is None else default

    reward = row.rm_type or defaults.rm_type
    return EvalSet(
        name=row.name,
        path=row.path,
        input_key=chosen("input_key", "eval_input_key"),
        label_key=chosen("label_key", "eval_label_key"),
        tool_key=chosen("tool_key", "tool_key"),
        metadata_key=chosen("metadata_key", "metadata_key"),
        n_samples=chosen("n_samples_per_eval_prompt", "n_samples_per_eval_prompt"),
        temperature=chosen("temperature", "eval_temperature"),
        top_p=chosen("top_p", "eval_top_p"),
        top_k=chosen("top_k", "eval_top_k"),
        max_response_len=chosen("max_response_len", "eval_max_response_len"),
        min_new_tokens=chosen("min_new_tokens", "eval_min_new_tokens") or 0,
        stop=chosen("stop", "rollout_stop") or (),
        stop_token_ids=chosen("stop_token_ids", "rollout_stop_token_ids") or (),
        metadata={
            **({REWARD_KEY: reward} if reward else {}),
            **(defaults.metadata_overrides or {}),
            **(row.metadata_overrides or {}),
        },
    )


def _fault(value: str, problem: str, remedy: str) -> Fault:
    shown = value if not value.startswith(INLINE) else f"{INLINE}…"
    return Fault("eval_config", shown, problem, remedy)
