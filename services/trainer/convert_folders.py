"""The part of `miles convert` that writes a Hugging Face folder from another one, or compares two."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys
from typing import TYPE_CHECKING, Any

from miles.config.checks.json_file import read_json_object

if TYPE_CHECKING:
    from miles.precision.recipe import Recipe

BETWEEN_FOLDERS = ("hf-to-hf", "hf-to-fp8", "hf-to-int4", "new-draft")
_FORMATS = {"hf-to-fp8": "fp8_block", "hf-to-int4": "int4"}
_SHOWN = 20
"""Differences that are named."""


def add_folder_conversions(directions: Any) -> tuple[argparse.ArgumentParser, ...]:
    """Add the conversions to few bits, `new-draft` and `verify`; return all but `verify`."""
    fp8 = directions.add_parser("hf-to-fp8", help="matrices of a folder in FP8 blocks of 128 x 128, to another")
    fp8.add_argument(
        "--fp8-block-scales", choices=("float32", "power_of_two"), default="float32", help="kind of the scales"
    )
    int4 = directions.add_parser("hf-to-int4", help="matrices of a folder in groups of packed INT4, to another")
    int4.add_argument("--int4-group-size", type=int, metavar="N", help="elements that share a scale (default: 128)")
    int4.add_argument(
        "--int4-layers", nargs="+", metavar="PART", help="parts of names of what is quantised (default: .experts.)"
    )
    for each in (fp8, int4):
        help_kept = "parts of names of matrices that are kept"
        each.add_argument("--extra-high-precision-layers-hf", nargs="+", default=(), metavar="PART", help=help_kept)
        help_rules = "modules that are kept: names, or regular expressions after `re:`"
        each.add_argument("--ignore-rules", nargs="+", default=(), metavar="RULE", help=help_rules)
        each.add_argument("--first-last-layers-bf16", action="store_true", help="keep the first and last layers")
        for end in ("start", "end"):
            each.add_argument(f"--num-layers-at-{end}-in-bf16", type=int, default=1, metavar="N", help="how many")
    draft = directions.add_parser("new-draft", help="an EAGLE-3 head from nothing, for the policy in a folder")
    draft.add_argument("--layers", type=int, default=1, metavar="N", help="decoder layers (default: 1)")
    draft.add_argument(
        "--draft-vocab", type=int, metavar="N", help="tokens it can draft (default: all of the policy's)"
    )
    compared = directions.add_parser("verify", help="compare a folder in FP8 or INT4 with what another becomes")
    compared.add_argument("--hf-checkpoint", type=pathlib.Path, required=True, metavar="DIR", help="where it is from")
    compared.add_argument("--quantised", type=pathlib.Path, required=True, metavar="DIR", help="folder in few bits")
    return fp8, int4, draft


def convert_folder(options: argparse.Namespace, partial: pathlib.Path) -> int:
    """Write a folder, which gets its name when it is complete; returns the exit code."""
    from miles.drafts.new_head import write_new_head
    from miles.services.trainer.checkpoint.plain_model import write_plain_model
    from miles.services.trainer.checkpoint.quantised_model import write_quantised_model
    from miles.services.trainer.step import algorithm_options

    source, dtype = options.hf_checkpoint, algorithm_options.DTYPES[options.dtype]
    try:
        _require_model(source)
        if options.direction == "hf-to-hf":
            write_plain_model(source, partial, dtype)
        elif options.direction == "new-draft":
            layers, tokens = options.layers, options.draft_vocab
            write_new_head(source, partial, layers=layers, draft_vocab=tokens, dtype=dtype)
        else:
            write_quantised_model(source, partial, recipe_asked(options), dtype)
        os.rename(partial, options.save)
    except (OSError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        print(f"miles convert: {error}", file=sys.stderr)
        return 1
    return 0


def recipe_asked(options: argparse.Namespace) -> Recipe:
    """What a job with settings of the options' names serves its engines by."""
    from miles.config.sections.precision import PrecisionConfig
    from miles.precision.of_run import rollout_recipe_of
    from miles.services.trainer.checkpoint.plain_model import plain_config

    named = {key: value for key, value in vars(options).items() if key in PrecisionConfig.model_fields}
    given = {
        key: tuple(value) if isinstance(value, list) else value for key, value in named.items() if value is not None
    }
    settings = PrecisionConfig.model_validate({"rollout_weight_format": _FORMATS[options.direction], **given})
    recipe = rollout_recipe_of(settings, plain_config(read_json_object(options.hf_checkpoint / "config.json")))
    assert recipe is not None, "a format was asked for"
    layers = dataclasses.replace(recipe.layers, ignored=tuple(options.ignore_rules))
    return dataclasses.replace(recipe, layers=layers)


def verify(options: argparse.Namespace) -> int:
    """Compare; returns the exit code, 1 for a difference."""
    from miles.services.trainer.checkpoint.quantised_model import differences

    try:
        for folder in (options.hf_checkpoint, options.quantised):
            _require_model(folder)
        found = list(differences(options.hf_checkpoint, options.quantised))
    except (OSError, ValueError) as error:
        print(f"miles convert: {error}", file=sys.stderr)
        return 1
    for difference in found[:_SHOWN]:
        print(difference)
    if found:
        more = f", of which {_SHOWN} are named" if len(found) > _SHOWN else ""
        print(f"{options.quantised} is not what {options.hf_checkpoint} becomes: {len(found)} tensors differ{more}")
        return 1
    print(f"{options.quantised} is what {options.hf_checkpoint} becomes, bit for bit")
    return 0


def _require_model(folder: pathlib.Path) -> None:
    """Raise FileNotFoundError for a folder without a model."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model in {folder}: there is no config.json")
