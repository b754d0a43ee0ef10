"""An export is what was trained: its template, its code, its types, and nothing of other weights."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import write_dense_model

from miles.services.trainer.checkpoint.hf_files import set_chat_template, set_dtype, write_hf_checkpoint
from miles.weights.naming.model_tensors import read_model_tensors

pytestmark = pytest.mark.usefixtures("process_group")

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_dense_model(tmp_path / "model")


@pytest.fixture
def template(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "mine.jinja"
    path.write_text(TEMPLATE)
    return path


def export(model: pathlib.Path, folder: pathlib.Path, template: pathlib.Path | None = None) -> None:
    weights = load_file(model / "model.safetensors")
    tensors = read_model_tensors(model)
    write_hf_checkpoint(folder, model, tensors, iter(weights.items()), torch.bfloat16, chat_template=template)


def test_the_template_that_was_trained_with_takes_the_place_of_every_other(
    model: pathlib.Path, template: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from transformers import AutoTokenizer

    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": "old"}))
    (model / "chat_template.json").write_text('{"chat_template": "older"}')
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("oldest")
    export(model, tmp_path / "own")
    assert AutoTokenizer.from_pretrained(tmp_path / "own").chat_template is not None
    assert (tmp_path / "own" / "additional_chat_templates" / "tools.jinja").read_text() == "oldest"
    export(model, tmp_path / "out", template)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and b"old" in p.read_bytes()]


def test_code_and_generation_settings_are_copied_and_other_weights_are_not(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for name in ("modeling_own.py", "layers/attention.py", "preprocessor_config.json", "added_tokens.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    for name in ("model.gguf", "pytorch_model.bin", "tf_model.h5", ".cache/lock.py", "adapter/adapter_config.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("other")
    export(model, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"modeling_own.py", "layers/attention.py", "preprocessor_config.json", "added_tokens.json"} <= found
    assert {"generation_config.json", "tokenizer.json", "model.safetensors", "config.json"} <= found
    assert not [name for name in found if name.endswith((".gguf", ".bin", ".h5")) or name.startswith((".", "adapter"))]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"torch_dtype": "float32"}},
            {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}},
        ),
    ],
)
def test_the_type_is_written_under_the_name_that_the_config_has(
    tmp_path: pathlib.Path, config: dict[str, object], expected: dict[str, object]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    set_dtype(path, torch.bfloat16)
    assert json.loads(path.read_text()) == expected


def test_a_tokenizer_without_settings_gets_the_template(template: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").mkdir()
    set_chat_template(tmp_path / "out", template)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_failed_write_takes_every_tensor_before_it_is_raised(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """All-gathering a tensor is collective: a rank that left early would have the others wait."""
    taken = 0

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal taken
        for name, tensor in load_file(model / "model.safetensors").items():
            taken += 1
            yield name, tensor

    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="file"):
        write_hf_checkpoint(blocked / "out", model, read_model_tensors(model), counted(), torch.float32)
    assert taken == len(load_file(model / "model.safetensors"))
