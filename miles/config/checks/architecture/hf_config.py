"""A config.json as the tables read it: the text model's part, with what its class in transformers defaults to."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """What a setting may be, and the key of config.json that says so."""

    key: str
    values: tuple[Any, ...]
    """The first one is shown; the others mean the same of this model. None: the setting is of no consequence in it."""


class HfConfig:
    """Keys of a config.json. Those of a model that sees or hears are its text model's."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        text = model.get("text_config")
        self._keys = {**model, **text} if isinstance(text, Mapping) else dict(model)
        self.type = str(self._keys.get("model_type", ""))

    def given(self, *names: str) -> tuple[str, Any] | None:
        """Return the first of these keys that config.json has a value for, with the value."""
        return next(((name, self._keys[name]) for name in names if self._keys.get(name) is not None), None)

    def find(self, *names: str) -> tuple[str, Any] | None:
        """Do the same, and else with the default of the model's class in transformers, if that is installed."""
        if (found := self.given(*names)) is not None:
            return found
        defaults = class_defaults(self.type)
        return next(((name, defaults[name]) for name in names if defaults.get(name) is not None), None)

    def value(self, *names: str) -> Any:
        """Return only the value that config.json has."""
        found = self.given(*names)
        return None if found is None else found[1]

    @property
    def is_latent(self) -> bool:
        """Whether attention is multi-head latent attention."""
        return self.value("kv_lora_rank") is not None or self.type == "deepseek_v4"

    @property
    def has_experts(self) -> bool:
        """Whether some layers have experts."""
        return self.value("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts") is not None

    def rope(self) -> list[dict[str, Any]]:
        """Return what is said of rotary positions, once for each kind of layer that has its own."""
        return _rope(self._keys) or _rope(class_defaults(self.type))


def _rope(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    said = source.get("rope_parameters") or source.get("rope_scaling")
    own = {key: source[key] for key in ("rope_theta", "partial_rotary_factor") if source.get(key) is not None}
    kinds = [kind for kind in said.values() if isinstance(kind, Mapping)] if isinstance(said, Mapping) else []
    parts = kinds or ([said] if isinstance(said, Mapping) else [])
    return [{**own, **part} for part in parts or [{}]] if parts or own else []


@functools.cache
def class_defaults(kind: str) -> Mapping[str, Any]:
    """Return the defaults of the configuration class of a model type; empty without transformers or such a class."""
    if not kind or importlib.util.find_spec("transformers") is None:
        return {}
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return {}
    defaults: dict[str, Any] = CONFIG_MAPPING[kind]().to_dict()
    return defaults
