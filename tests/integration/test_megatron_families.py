"""Every family in the table of docs/megatron.md, converted to Megatron-Core and back as the table says."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pytest
import torch
from megatron_kit import ROOT, SUPPORT, needs_megatron, run_python
from megatron_models import FAMILIES, write_model
from safetensors.torch import load_file, save_file
from trainer_cases import VOCAB

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800), needs_megatron]

DOCUMENT = ROOT / "docs" / "megatron.md"
START, END = "<!-- families: written by tests/integration/test_megatron_families.py -->", "<!-- end of families -->"
WITHOUT_ENGINE = {"Llama 4": "megatron-bridge 0.6.2 has no text model of it"}
"""Families that the local layers do not have, and why."""


def folder_of(family: str) -> str:
    return family.replace(", ", "-").replace(" ", "-")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `megatron_families` found, by folder."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("families")
    tokens = torch.arange(3, 27) * 3 % VOCAB
    for family in FAMILIES:
        folder = write_model(family, root / folder_of(family))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / "reference.safetensors")
    output = run_python([str(SUPPORT / "megatron_families.py"), str(root)])
    lines = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    return {line["folder"]: line for line in lines}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The table of the document."""
    rows = ["| family | local layers: logits as in Transformers | weights back |", "|---|---|---|"]
    for family in FAMILIES:
        found = results[folder_of(family)]
        if "error" in found:
            rows.append(f"| {family} | no: {WITHOUT_ENGINE[family]} | |")
        else:
            rows.append(f"| {family} | within 2e-5 | {'bit for bit' if found['weights_equal'] else 'no'} |")
    return "\n".join(rows)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_ENGINE])
def test_a_family_has_the_same_logits_and_gets_its_weights_back(
    results: dict[str, dict[str, Any]], family: str
) -> None:
    found = results[folder_of(family)]
    assert "error" not in found, found
    assert found["logits"] < 2e-5
    assert found["weights_equal"]


def test_a_checkpoint_holds_layers_for_multi_token_prediction(tmp_path: pathlib.Path) -> None:
    """Written with a folder as a pattern whose own have other values, they are those of the model converted first."""
    source = write_model("DeepSeek-V3, MTP", tmp_path / "source")
    pattern = write_model("DeepSeek-V3, MTP", tmp_path / "pattern")
    tensors = load_file(pattern / "model.safetensors")
    own = [name for name in tensors if name.startswith("model.layers.4.")]
    save_file({**tensors, **{name: torch.zeros_like(tensors[name]) for name in own}}, pattern / "model.safetensors")
    convert = ["-m", "miles.services.trainer.convert"]
    held = ["--mtp-num-layers", "1", "--dtype", "float32"]
    kept, back = str(tmp_path / "dist"), tmp_path / "back"
    run_python([*convert, "hf-to-dist", "--hf-checkpoint", str(source), "--save", kept, *held])
    run_python([*convert, "dist-to-hf", "--hf-checkpoint", str(pattern), "--load", kept, "--save", str(back), *held])
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert len(own) > 20
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", WITHOUT_ENGINE)
def test_a_family_that_the_layers_lack_is_refused(results: dict[str, dict[str, Any]], family: str) -> None:
    assert "ValueError" in results[folder_of(family)]["error"]


def test_the_document_has_the_table(results: dict[str, dict[str, Any]]) -> None:
    """MILES_WRITE_DOCS=1 writes it."""
    text = DOCUMENT.read_text()
    before, rest = text.split(START)
    current, after = rest.split(END)
    if os.environ.get("MILES_WRITE_DOCS"):
        pathlib.Path(DOCUMENT).write_text(f"{before}{START}\n\n{table(results)}\n\n{END}{after}")
    else:
        assert current.strip() == table(results)
