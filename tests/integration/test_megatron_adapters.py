"""Adapters of the megatron backend: trained alike in every layout, resumed, merged as engines merge them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from megatron_kit import needs_megatron, run_cases
from megatron_models import write_model
from safetensors.torch import load_file

from miles.services.rollout.engines.checkpoint_weights import read_weights
from miles.weights.adapters import lora, peft_folder

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800), needs_megatron]

RANK, ALPHA = 4, 8
ADAPTED = {"lora_rank": RANK, "lora_alpha": ALPHA, "use_kl_loss": True, "kl_loss_coef": 0.1, "adam_eps": 1e-3}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp": {"pipeline_model_parallel_size": 2},
    "dp": {"use_distributed_optimizer": True},
    "cp": {"context_parallel_size": 2},
}


def case(name: str, model: pathlib.Path, **flags: Any) -> dict[str, Any]:
    """Three steps."""
    return {"name": name, "model": str(model), "flags": {"train_backend": "megatron", **ADAPTED, **flags}}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with what one process gave."""
    out = tmp_path_factory.mktemp("adapters")
    model, tied = write_model("Llama", out / "model"), write_model("Llama, tied", out / "tied")
    run_cases(
        [
            {**case("one", model), "save_at": 2, "save_hf": True},
            case("resumed", model, load=str(out / "one" / "checkpoints")),
            case("recomputed", model, **RECOMPUTE),
            {**case("attention", tied, target_modules="q_proj,k_proj,v_proj,o_proj"), "steps": 1},
        ],
        out,
    )
    return out


@pytest.fixture(scope="module")
def more_results(results: pathlib.Path) -> pathlib.Path:
    """The same folder with what two ranks gave."""
    run_cases([case(name, results / "model", **layout) for name, layout in LAYOUTS.items()], results, ranks=2)
    return results


def differences(out: pathlib.Path, left: str, right: str) -> tuple[float, float]:
    """Largest difference of the last step's metrics and of the exported adapters."""
    metrics = [json.loads((out / f"{name}.json").read_text())["metrics"][-1] for name in (left, right)]
    keys = ("train/pg_loss", "train/kl_loss", "train/grad_norm")
    weights = [load_file(out / f"{name}.safetensors") for name in (left, right)]
    assert weights[0].keys() == weights[1].keys()
    return (
        max(abs(metrics[0][key] - metrics[1][key]) for key in keys),
        max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]),
    )


def test_an_adapter_learns_and_is_all_that_is_exported(results: pathlib.Path) -> None:
    exported = load_file(results / "one.safetensors")
    weights = lora.adapted_weights(exported)
    assert len(weights) == 4 * 7
    assert all(exported[lora.adapter_names(weight)[1]].abs().max() > 1e-3 for weight in weights)
    last = json.loads((results / "one.json").read_text())["metrics"][-1]
    assert abs(last["train/kl_loss"]) > 1e-4  # the reference is the base, which stays
    assert len(lora.adapted_weights(load_file(results / "attention.safetensors"))) == 4 * 4


@pytest.mark.parametrize(("name", "model"), [("one", "model"), ("attention", "tied")])
def test_engines_know_the_base_by_its_identity(results: pathlib.Path, name: str, model: str) -> None:
    base = read_weights(str(results / model), "float32")
    said = json.loads((results / f"{name}.json").read_text())["base"]
    assert said == lora.base_checksum(base.items(), torch.float32).hex()


def test_a_resumed_adapter_goes_on_bit_for_bit(results: pathlib.Path) -> None:
    assert differences(results, "one", "resumed") == (0.0, 0.0)


def test_recomputed_layers_train_the_same_adapter(results: pathlib.Path) -> None:
    assert differences(results, "one", "recomputed") == (0.0, 0.0)


def test_the_folder_has_the_weights_that_engines_merge(results: pathlib.Path) -> None:
    base, full = (read_weights(str(results / part), "float32") for part in ("model", "one/hf"))
    saved = peft_folder.read(results / "one" / "hf" / "adapter")
    assert (saved.rank, saved.alpha) == (RANK, ALPHA)
    adapted = lora.adapted_weights(saved.tensors)
    for name, weight in base.items():
        if name in adapted:
            a_RI, b_OR = (saved.tensors[part] for part in lora.adapter_names(name))
            assert torch.equal(full[name], lora.merged(weight, a_RI, b_OR, ALPHA / RANK))
        else:
            assert torch.equal(full[name], weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_adapter_is_trained_alike_in_every_layout(more_results: pathlib.Path, name: str) -> None:
    metrics, weights = differences(more_results, "one", name)
    assert metrics < 1e-5
    assert weights < 1e-5
