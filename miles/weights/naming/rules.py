"""The conversion of a model's tensors, from the tables by which transformers loads and saves its family."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from miles.weights.naming.conversion import Conversion, Group, Step

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def conversion_of(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Conversion:
    """The conversion of `tensors`, a model's own by name; `model` and they are on the meta device.

    Raises ValueError for a family whose conversion transformers cannot revert.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    # As transformers saves: without old spellings and prefixes, of which a configuration does not tell.
    rules = [
        rule
        for rule in get_model_conversion_mapping(model, add_legacy=False)[::-1]
        if not isinstance(rule, PrefixChange)
    ]
    try:
        inverse = [rule.reverse_transform() for rule in rules]
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"transformers cannot save a {model.config.model_type} as it was loaded: {error}") from error
    converters = [(rule, back) for rule, back in zip(rules, inverse, strict=True) if isinstance(back, WeightConverter)]
    renamings = [back for back in inverse if not isinstance(back, WeightConverter)]
    return Conversion(_groups(model, tensors, converters, renamings))


def _groups(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], converters: list[tuple[Any, Any]], renamings: list[Any]
) -> Iterator[Group]:
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    def renamed(name: str) -> str:
        return str(rename_source_key(name, renamings, [])[0])

    members: dict[str, list[tuple[str, str]]] = {}
    used: dict[str, tuple[Any, Any]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        for rule, back in converters:
            key, pattern = back.rename_source_key(name)
            if pattern is not None:
                members.setdefault(key, []).append((name, pattern))
                used[key] = rule, back
                break
        else:
            if (new := renamed(name)) != name:
                yield Group(_renaming(model, name, new), _renaming(model, new, name))
    for key, sources in members.items():
        rule, back = used[key]
        once = copy.deepcopy(back)
        for name, pattern in sources:
            once.add_tensor(key, name, pattern, tensors[name])
        made: list[str] = list(once.convert(key, model=model, config=model.config))
        module = _by_pattern(sources)
        split = Step(module, [renamed(name) for name in made], back, model)
        found = [(renamed(name), str(rule.rename_source_key(name)[1])) for name in made]
        found.sort(key=lambda source: dot_natural_key(source[0]))
        whole = [name for pattern in rule.target_patterns for name in module[pattern]]
        yield Group(split, Step(_by_pattern(found, rule.source_patterns), whole, rule, model))


def _renaming(model: PreTrainedModel, old: str, new: str) -> Step:
    return Step({"": [old]}, [new], None, model)


def _by_pattern(sources: list[tuple[str, str]], order: list[str] | None = None) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {pattern: [] for pattern in order or ()}
    for name, pattern in sources:
        found.setdefault(pattern, []).append(name)
    return found
