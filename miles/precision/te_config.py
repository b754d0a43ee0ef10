"""Megatron's file of precision by module (--te-precision-config-file): what it keeps out of the trainer's format.

The file has configs, each a recipe of TransformerEngine, and matchers, each a glob of modules' names with the config
that they get; the first matcher decides (megatron.core.quantization.quant_config). A run has one format, which engines
have too, so a config may only keep modules in high precision, or repeat the run's own recipe.
"""

from __future__ import annotations

import base64
import binascii
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from miles.precision.megatron_names import ModulePattern

BASE64 = "base64:"
_KIND = "transformer_engine_config_type"
_PARAMS = "TEQuantizationParams"
_FP8, _FP4 = "fp8_quantization_recipe", "fp4_quantization_recipe"
_RECIPE_KEYS = frozenset(
    {_FP8, _FP4, "fp8_format", "override_quantized_autocast", "override_nonquantized_autocast", "tp_only_amax_red"}
)


class PrecisionFileError(ValueError):
    """A file that cannot be read, or asks for what one format for trainer and engines cannot be."""


def patterns_in(value: str, fp8: tuple[str, str] | None, fp4: str | None) -> tuple[ModulePattern, ...]:
    """The patterns of a file, or of its content after `base64:`, in the order of its matchers.

    Args:
        fp8: The run's fp8_recipe and fp8_format; None when it trains in another format.
        fp4: The run's fp4_recipe.

    Raises PrecisionFileError.
    """
    content = _read(value)
    configs, matchers = content.get("configs") or {}, content.get("matchers") or {}
    if not isinstance(configs, Mapping) or not isinstance(matchers, Mapping):
        raise PrecisionFileError("its configs or matchers are no mapping of names")
    patterns = []
    for name, matcher in matchers.items():
        if not isinstance(matcher, Mapping):
            raise PrecisionFileError(f"its matcher {name} has no type, pattern and config")
        if not matcher.get("enabled", False):
            continue
        glob, config = matcher.get("pattern"), matcher.get("config")
        if matcher.get("type") != "glob" or not isinstance(glob, str) or config not in configs:
            raise PrecisionFileError(f"its matcher {name} is no glob with a pattern and one of the file's configs")
        patterns.append(ModulePattern(glob, _is_high(str(config), configs[config], fp8, fp4)))
    return tuple(patterns)


def _read(value: str) -> Mapping[str, Any]:
    try:
        if value.startswith(BASE64):
            text = base64.b64decode(value.removeprefix(BASE64), validate=True).decode("utf-8")
        else:
            text = pathlib.Path(value).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except binascii.Error as error:
        raise PrecisionFileError("what follows base64: is not base64") from error
    except OSError as error:
        raise PrecisionFileError(f"it cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise PrecisionFileError("it is not YAML") from error
    if not isinstance(content, Mapping):
        raise PrecisionFileError("it has no configs and matchers")
    return content


def _is_high(name: str, config: Any, fp8: tuple[str, str] | None, fp4: str | None) -> bool:
    """Whether a config keeps its modules in high precision; not when it is the run's own recipe."""
    if not isinstance(config, Mapping) or config.get(_KIND) != _PARAMS:
        raise PrecisionFileError(f"its config {name} is no {_PARAMS}")
    recipe = config.get("training_recipe")
    if not isinstance(recipe, Mapping):
        raise PrecisionFileError(f"its config {name} has no training_recipe")
    if config.get("evaluation_recipe", recipe) != recipe:
        raise PrecisionFileError(f"its config {name} computes otherwise where nothing is trained, as for log-probs")
    if unknown := sorted(set(recipe) - _RECIPE_KEYS):
        raise PrecisionFileError(f"its config {name} sets {unknown[0]}, which is not chosen by module")
    if recipe.get(_FP8) is None and recipe.get(_FP4) is None:
        return bool(recipe.get("override_quantized_autocast", True))
    eight = None if recipe.get(_FP8) is None else (recipe[_FP8], recipe.get("fp8_format", "e4m3"))
    if (eight, recipe.get(_FP4)) != (fp8, fp4) or recipe.get("override_nonquantized_autocast"):
        other = recipe.get(_FP8) or recipe.get(_FP4)
        raise PrecisionFileError(f"its config {name} computes some modules in {other}, and a run has one format")
    return False
