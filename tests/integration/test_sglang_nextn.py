"""SGLang's NextN drafts take a policy's MTP layers by the names under which a trainer publishes them."""

from __future__ import annotations

import json
import pathlib
import subprocess

import pytest
from megatron_models import write_model
from safetensors.torch import load_file, save_file
from sglang_kit import CPU_PYTHON, ON_GPU, have_sglang

from miles.weights.naming.contract import WeightContract
from miles.weights.naming.model_tensors import read_model_tensors
from miles.weights.naming.published import PublishedTensors

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for CPUs (make test-engines installs it)"),
]

DRAFTS = {
    "GLM-4.5": "Glm4MoeForCausalLMNextN",
    "GLM-4.7-Flash": "Glm4MoeLiteForCausalLMNextN",
    "DeepSeek-V3": "DeepseekV3ForCausalLMNextN",
    "MiMo": "MiMoMTP",
}
"""By family, what SGLang drafts with."""
SHARED = ["lm_head.weight", "model.embed_tokens.weight"]
"""What SGLang gives a draft of the policy's own; MiMo's reads them from the policy's tensors besides."""


def publish_code(folder: pathlib.Path) -> None:
    """Name and write the code that MiMo's published folders have, of which SGLang reads the configuration."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_mimo.MiMoConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    code = 'from transformers import Qwen2Config\n\n\nclass MiMoConfig(Qwen2Config):\n    model_type = "mimo"\n'
    (folder / "configuration_mimo.py").write_text(code)


@pytest.mark.parametrize("family", DRAFTS)
def test_a_draft_is_filled_by_the_published_tensors_but_for_what_the_model_shares(
    family: str, tmp_path: pathlib.Path
) -> None:
    write_model(family, tmp_path / "model", num_nextn_predict_layers=1)
    file = tmp_path / "model" / "model.safetensors"
    stored = load_file(file)
    published = PublishedTensors(
        read_model_tensors(tmp_path / "model"), WeightContract(form="checkpoint", mtp=True)
    ).shapes
    save_file({name: stored[name] for name in published}, file, metadata={"format": "pt"})
    if family == "MiMo":
        publish_code(file.parent)
    command = [str(CPU_PYTHON), str(pathlib.Path(__file__).parents[1] / "support" / "sglang_nextn.py")]
    process = subprocess.run([*command, str(file.parent)], capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    said = json.loads(process.stdout.split("RESULT ")[1].splitlines()[0])
    assert said["draft"] == DRAFTS[family]
    assert said["empty"] == ([] if family == "MiMo" else SHARED)
    assert said["shares"]
