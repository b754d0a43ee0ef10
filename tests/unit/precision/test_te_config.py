"""Megatron's file of precision by module: what it keeps, and what it asks for that one format cannot be."""

from __future__ import annotations

import base64
import pathlib
import textwrap

import pytest

from miles.precision.megatron_names import ModulePattern
from miles.precision.te_config import PrecisionFileError, patterns_in

HIGH = """
    configs:
      bf16:
        transformer_engine_config_type: TEQuantizationParams
        training_recipe: {}
      own:
        transformer_engine_config_type: TEQuantizationParams
        training_recipe: {fp8_quantization_recipe: blockwise}
    matchers:
      projections:
        type: glob
        enabled: true
        pattern: "*.self_attention.indexer.linear_weights_proj"
        config: bf16
      off:
        type: glob
        enabled: false
        pattern: "*"
        config: nothing
      rest:
        type: glob
        enabled: true
        pattern: "*"
        config: own
"""
FP8 = ("blockwise", "e4m3")


def encoded(text: str) -> str:
    return "base64:" + base64.b64encode(textwrap.dedent(text).encode()).decode()


def test_matchers_become_patterns_in_their_order(tmp_path: pathlib.Path) -> None:
    wanted = (
        ModulePattern("*.self_attention.indexer.linear_weights_proj", kept=True),
        ModulePattern("*", kept=False),
    )
    assert patterns_in(encoded(HIGH), FP8, None) == wanted
    (tmp_path / "precision.yaml").write_text(textwrap.dedent(HIGH))
    assert patterns_in(str(tmp_path / "precision.yaml"), FP8, None) == wanted


def test_a_config_that_leaves_modules_as_they_are_keeps_none() -> None:
    text = HIGH.replace("training_recipe: {}", "training_recipe: {override_quantized_autocast: false}")
    assert not any(pattern.kept for pattern in patterns_in(encoded(text), FP8, None))


@pytest.mark.parametrize(
    ("text", "fp8", "problem"),
    [
        (HIGH, ("mxfp8", "e4m3"), "its config own computes some modules in blockwise, and a run has one format"),
        (HIGH, ("blockwise", "hybrid"), "computes some modules in blockwise"),
        (HIGH, None, "computes some modules in blockwise"),
        (HIGH.replace("config: own", "config: other"), FP8, "its matcher rest is no glob with a pattern and one of"),
        (HIGH.replace("{}", "{fp8_param: true}"), FP8, "its config bf16 sets fp8_param, which is not chosen by module"),
        (HIGH.replace("TEQuantizationParams", "Kitchen"), FP8, "its config bf16 is no TEQuantizationParams"),
        (
            HIGH.replace("training_recipe: {}", "training_recipe: {}\n        evaluation_recipe: {fp8_format: hybrid}"),
            FP8,
            "its config bf16 computes otherwise where nothing is trained",
        ),
        ("- 1", FP8, "it has no configs and matchers"),
        ("{", FP8, "it is not YAML"),
    ],
)
def test_what_cannot_be_done_is_said(text: str, fp8: tuple[str, str] | None, problem: str) -> None:
    with pytest.raises(PrecisionFileError, match=problem):
        patterns_in(encoded(text), fp8, None)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(PrecisionFileError, match=r"it cannot be read \(No such file or directory\)"):
        patterns_in("/nothing/here.yaml", FP8, None)
