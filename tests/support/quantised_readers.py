"""How other programs read folders in FP8 and INT4; run by the interpreter of SGLang's installation.

    quantised_readers.py FOLDER OUT ROOT

Writes the weights that transformers and compressed-tensors decompress to the file OUT; and for each folder below ROOT
prints which modules of the JSON list in its modules.json SGLang does not quantise. It uses none of our code.
"""

from __future__ import annotations

import json
import pathlib
import sys


def decompress(folder: str, out: str) -> None:
    """Write all weights of a dense model in bfloat16."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ModelCompressor.from_pretrained_model(model).decompress_model(model)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out)


def skipped(folder: pathlib.Path) -> list[str]:
    """Names of modules."""
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    modules = json.loads((folder / "modules.json").read_text())
    if stated["quant_method"] == "fp8":
        from sglang.srt.layers.quantization.fp8 import Fp8Config
        from sglang.srt.layers.quantization.utils import is_layer_skipped

        fp8 = Fp8Config.from_config(stated)
        return [name for name in modules if is_layer_skipped(name, fp8.ignored_layers or [])]
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from sglang.srt.layers.quantization.compressed_tensors.utils import should_ignore_layer

    packed = CompressedTensorsConfig.from_config(stated)
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    return [name for name in modules if should_ignore_layer(name, ignore=packed.ignore, fused_mapping=fused)]


def main(folder: str, out: str, root: str) -> None:
    """Do both."""
    decompress(folder, out)
    for each in sorted(pathlib.Path(root).iterdir()):
        print("RESULT", json.dumps({"folder": each.name, "skipped": skipped(each)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
