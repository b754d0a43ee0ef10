"""The table of docs/families.md: every family in each trainer and engine, by tiny models of real code."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import pathlib
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from family_table import ROWS, family_table
from megatron_families import write_expected
from megatron_kit import ROOT, SUPPORT, needs_megatron, run_python
from megatron_models import FAMILIES, write_model
from quantised_models import RECIPES, write_quantised
from safetensors.torch import load_file, save_file
from torch_engine_models import reference_log_probs, respond, running_engine, weights_of
from trainer_cases import job_config, random_groups

from miles.config.checks import known_models
from miles.config.checks.model_family import attention_limit, why_not_fsdp, why_not_megatron, why_not_torch
from miles.services.trainer.backends.fsdp.replay.moe_layers import find_moe_layers
from miles.services.trainer.ranks.worker import create_backend

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800), needs_megatron]

DOCUMENT = ROOT / "docs" / "families.md"
START, END = "<!-- written by tests/integration/test_families.py -->", "<!-- end -->"
PROMPT = [3 + 7 * i % 90 for i in range(24)]


def folder_of(family: str) -> str:
    return family.replace(", ", "-").replace(" ", "-")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A model of each family."""
    root = tmp_path_factory.mktemp("families")
    return {family: write_model(family, root / folder_of(family)) for family in FAMILIES}


def config_of(folder: pathlib.Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def stock_model(folder: pathlib.Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


QUANTISED = [("Llama, tied", "fp8"), ("Qwen3-MoE", "int4"), ("DeepSeek-V3, MTP", "fp8"), ("GLM-4.5", "int4")]


@pytest.fixture(scope="module")
def converted(folders: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `megatron_families` found, by family, and `quantised, ` before it."""
    root, place = next(iter(folders.values())).parent, tmp_path_factory.mktemp("quantised")
    quantised = {
        f"quantised, {family}": write_quantised(family, place / folder_of(f"quantised, {family}"), RECIPES[kind])
        for family, kind in QUANTISED
    }
    quantised = {family: folder.rename(root / folder.name) for family, folder in quantised.items()}
    for folder in (*folders.values(), *quantised.values()):
        write_expected(folder)
    output = run_python([str(SUPPORT / "megatron_families.py"), str(root)])
    lines = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    found = {line["folder"]: line for line in lines}
    return {family: found[folder_of(family)] for family in (*FAMILIES, *quantised)}


@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_has_the_same_logits_and_gives_weights_back_or_is_refused(
    folders: dict[str, pathlib.Path], converted: dict[str, dict[str, Any]], family: str
) -> None:
    found = converted[family]
    if why_not_megatron(config_of(folders[family])) is not None:
        assert "is not yet supported" in found["error"]
        return
    assert "error" not in found, found
    assert found["logits"] < 2e-5
    assert found["weights_equal"]


@pytest.mark.parametrize("family", [family for family, _ in QUANTISED])
def test_megatron_computes_with_what_quantised_weights_stand_for(
    converted: dict[str, dict[str, Any]], family: str
) -> None:
    found = converted[f"quantised, {family}"]
    assert "error" not in found, found
    assert found["logits"] < 2e-5
    assert found["weights_equal"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("family", [row.tiny for row in ROWS])
def test_fsdp_trains_as_transformers_computes_and_gives_weights_back(
    folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, family: str
) -> None:
    folder = folders[family]
    assert why_not_fsdp(config_of(folder)) is None
    backend = create_backend(
        job_config(folder, run_dir=str(tmp_path / "run"), log_samples_per_step=0), tmp_path, torch.device("cpu")
    )
    backend.load()
    try:
        backend.save_hf(tmp_path / "before")
        groups = random_groups(0)
        samples = [sample for group in groups for sample in group.samples]
        stock = stock_model(folder)
        for sample in samples:
            prompt, response = np.split(sample.tokens, [sample.prompt_length])
            sample.rollout_log_probs = reference_log_probs(stock, prompt.tolist(), response.tolist()).numpy()
        metrics = backend.train(0, groups, lambda progress: None)
        backend.save_hf(tmp_path / "after")
    finally:
        backend.close()
    assert metrics["train/train_rollout_logprob_abs_diff"] < 1e-5
    places = folder, tmp_path / "before", tmp_path / "after"
    source, before, after = (load_file(place / "model.safetensors") for place in places)
    assert source.keys() == before.keys() == after.keys()
    assert all(torch.equal(source[name], before[name]) for name in source)
    unchanged = [name for name in source if torch.equal(source[name], after[name])]
    frozen = re.compile(r"e_score_correction_bias|\.indexer\.|\.experts\.\d+\.")  # experts that no row was sent to
    assert not [name for name in unchanged if not frozen.search(name)]
    assert len(unchanged) < len(source) / 3


@pytest.mark.parametrize("family", [row.tiny for row in ROWS])
def test_the_torch_engine_has_the_log_probs_of_transformers(folders: dict[str, pathlib.Path], family: str) -> None:
    """In sequences of at most as many tokens as all layers see."""
    folder = folders[family]
    model, config = stock_model(folder), config_of(folder)
    assert why_not_torch(config) is None
    _, limit = attention_limit(config) or ("", config["max_position_embeddings"])
    longest = min(limit, len(PROMPT) + 30)
    prompt = PROMPT[: longest // 2]

    async def response() -> Any:
        async with running_engine(folder, weights_of(model), max_total_tokens=longest) as engine:
            return await respond(engine, prompt, seed=1, max_new_tokens=longest - len(prompt))

    found = asyncio.run(response())
    expected = reference_log_probs(model, prompt, found.tokens)
    torch.testing.assert_close(torch.tensor(found.log_probs), expected, atol=1e-5, rtol=0)


def test_the_known_architectures_are_those_of_megatron_bridge() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    spec = importlib.util.find_spec("megatron")  # to import the bridge takes TransformerEngine, or its stand-ins
    assert spec is not None
    models = [pathlib.Path(place) / "bridge" / "models" for place in spec.submodule_search_locations or ()]
    source = "\n".join(path.read_text() for folder in models for path in folder.rglob("*_bridge.py"))
    found = set(re.findall(r'register_bridge\(\s*source="?(\w+)', source))
    assert found & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) == known_models.BRIDGED


@pytest.mark.skipif("MILES_TEST_SGLANG" not in os.environ, reason="needs SGLang for the CPU: make test-engines")
def test_the_known_architectures_are_those_of_sglang() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    where = "import importlib.util; print(importlib.util.find_spec('sglang').submodule_search_locations[0])"
    command = [os.environ["MILES_TEST_SGLANG"], "-c", where]
    package = pathlib.Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    entries = "\n".join(
        match[1]
        for path in (package / "srt" / "models").glob("*.py")
        if (match := re.search(r"^EntryClass\s*=\s*(\[[^\]]*\]|\w+)", path.read_text(), re.M))
    )
    assert set(re.findall(r"\w+", entries)) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) == known_models.SERVED


def replays(model: torch.nn.Module) -> bool:
    try:
        return bool(find_moe_layers(model))
    except ValueError:
        return False


def test_the_document_has_the_table(folders: dict[str, pathlib.Path]) -> None:
    """MILES_WRITE_DOCS=1 writes it."""
    table = family_table(folders, {row.tiny: replays(stock_model(folders[row.tiny])) for row in ROWS})
    text = DOCUMENT.read_text()
    before, rest = text.split(START)
    current, after = rest.split(END)
    if os.environ.get("MILES_WRITE_DOCS"):
        DOCUMENT.write_text(f"{before}{START}\n\n{table}\n\n{END}{after}")
    else:
        assert current.strip() == table


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
