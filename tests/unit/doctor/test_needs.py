from __future__ import annotations

import json
import pathlib
import struct
from typing import Any

from config_cases import MINIMAL

from miles.config.command.flags import CommandLine
from miles.doctor import memory, needs
from miles.doctor.subject import Subject

CONFIG = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
}
"""Qwen3-0.6B, which has 596 million parameters."""


def job(files: pathlib.Path, **changes: Any) -> needs.Job:
    made = needs.job_of(Subject.of(CommandLine(flat={**MINIMAL, "device": "cpu", **changes})))
    assert made is not None
    return made


def write_weights(folder: pathlib.Path, *shapes: list[int]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    header |= {f"t{i}": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for i, shape in enumerate(shapes)}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def test_parameters_are_counted_in_the_weights_headers_or_estimated_from_the_config(files: pathlib.Path) -> None:
    assert needs.count_parameters(files / "model") == 0
    (files / "model" / "config.json").write_text(json.dumps(CONFIG))
    estimated = needs.count_parameters(files / "model")
    assert abs(estimated - 596e6) < 2e6
    write_weights(files / "model", [1000, 10], [7])
    assert needs.count_parameters(files / "model") == 10_007


def test_the_formulas_follow_the_configuration(files: pathlib.Path) -> None:
    write_weights(files / "model", [1000, 1000])
    plain = job(files, save_interval=3, save_hf="out/{rollout_id}")
    assert needs.trainer_memory(plain).bytes == 16_000_000
    assert needs.engine_memory(plain).bytes == 4_000_000
    assert needs.shared_memory(plain).bytes == 8_000_000
    assert needs.compared_versions(plain).bytes == 4_000_000
    assert needs.compared_versions(job(files, actor_num_gpus_per_node=2)).bytes == 8_000_000
    samples = 10 * 4 * 4 * 16 * 40
    assert needs.disk(plain).bytes == 4 * 12_000_000 + 4 * 4_000_000 + samples
    assert "4 checkpoints" in needs.disk(plain).formula
    assert needs.trainer_memory(job(files, advantage_estimator="ppo")).bytes == 32_000_000
    assert needs.trainer_memory(job(files, use_kl_loss=True)).bytes == 20_000_000
    assert needs.trainer_memory(job(files, lora_rank=8)).bytes == 4_000_000
    assert needs.engine_memory(job(files, train_dtype="bfloat16", rollout_num_workers=2)).bytes == 4_000_000
    assert needs.disk(job(files, no_save_optim=True)).bytes == 4_000_000 + 4_000_000 + samples
    assert needs.disk(job(files, num_rollout=0, eval_prompt_data=["a", "b"])).bytes == 0


def test_versions_that_are_compared_count_where_changes_are_sent(files: pathlib.Path) -> None:
    write_weights(files / "model", [1000, 1000])
    line = {**MINIMAL, "device": "cpu", "update_weight_disk_dir": str(files)}
    plain, changes = (
        memory.look(Subject.of(CommandLine(flat={**line, "update_weight_transfer_mode": mode}))).need
        for mode in ("auto", "disk_delta")
    )
    assert plain is not None
    assert changes is not None
    assert changes.bytes - plain.bytes == 4_000_000
    assert "last version" in changes.formula


def test_without_a_model_nothing_is_estimated(files: pathlib.Path) -> None:
    assert needs.job_of(Subject(None)) is None
    assert needs.job_of(Subject.of(CommandLine(flat={**MINIMAL, "hf_checkpoint": "elsewhere"}))) is None
