"""A whole run whose responses have 32k tokens, cut in the middle and resumed: what its processes hold grows as said."""

from __future__ import annotations

import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import pytest
import torch
from trainer_cases import VOCAB, write_tokenizer
from whole_runs import Run, recipe, runs_of_test

from miles.memory.sequences import Routing, SampleSize, first_rank_bytes, redis_bytes, rollout_bytes, step_bytes
from miles.rpc import ExitCode
from miles.types.stored import read_groups

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

LAYERS, HIDDEN, HEADS, TOP_K, EXPERTS = 2, 32, 4, 8, 16
SHORT, LONG = 512, 32_768
PROMPTS, SAMPLES = 2, 2
SLACK_BYTES = 64 << 20
"""What allocators keep of memory that was freed."""
ACTIVATION_BYTES = 24 * HIDDEN * 4
"""Of a row in a layer of this model, without the experts' part: norms, projections, residuals and their gradients."""
EXPERT_BYTES = 8 * TOP_K * HIDDEN * 4
"""Of a row in a layer: what its experts get and give."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A mixture of experts that never ends a response, and prompts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    made = tmp_path_factory.mktemp("long")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, moe_intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=8, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        norm_topk_prob=True, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
        max_position_embeddings=LONG + 64,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(made / "model")
    write_tokenizer(made / "model")
    lines = [json.dumps({"prompt": f"w{i} w{i + 1} w{i + 2}", "label": "w3"}) for i in range(8)]
    (made / "train.jsonl").write_text("\n".join(lines) + "\n")
    return made


class Peaks:
    """Follows the peak of resident memory of a run's processes, by worker name."""

    def __init__(self, run: Run) -> None:
        self.found: dict[str, int] = {}
        self._run = run
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while self._run.process.poll() is None:
            try:
                for name, process in self._run.processes().items():
                    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
                    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
                    self.found[name] = max(self.found.get(name, 0), int(line.split()[1]) * 1024)
            except (psutil.Error, OSError, ValueError):
                pass  # a process ended
            time.sleep(0.5)


def grown(run: Run, peaks: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    """How much higher the peaks are than those of another run."""
    assert peaks.keys() == before.keys(), run.output()
    return {name: peaks[name] - before[name] for name in peaks}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str], pathlib.Path], Run]]:
    with runs_of_test(tmp_path_factory.mktemp("runs")) as starting:
        yield starting


def settings(folder: pathlib.Path, run_dir: pathlib.Path, length: int) -> list[str]:
    changes: dict[str, Any] = {
        "num_rollout": 1, "rollout_batch_size": PROMPTS, "n_samples_per_prompt": SAMPLES,
        "rollout_max_response_len": length, "rollout_max_context_len": length + 32, "max_running_requests": 4,
        "max_tokens_per_gpu": length + 16, "use_rollout_routing_replay": True, "log_whole_samples": True,
        "log_samples_per_step": PROMPTS, "gradient_checkpointing": True,
    }  # fmt: skip
    return recipe(folder, run_dir, **changes)


def test_memory_grows_with_the_length_of_responses_as_is_said(
    folder: pathlib.Path, tmp_path: pathlib.Path, start: Callable[[list[str], pathlib.Path], Run]
) -> None:
    short = start(settings(folder, tmp_path / "short", SHORT), tmp_path / "short")
    short_peaks = Peaks(short)
    assert short.wait() == ExitCode.OK, short.output()
    run = start(settings(folder, tmp_path / "long", LONG), tmp_path / "long")
    peaks = Peaks(run)
    end = time.monotonic() + 600
    while "rollout-0" not in run.processes() and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(60)  # somewhere in the middle of the responses
    run.processes()["rollout-0"].terminate()
    assert run.wait(3000) == ExitCode.OK, run.output()

    [file] = (run.run_dir / "samples").glob("*.groups.pb")
    samples = [sample for group in read_groups(file) for sample in group.samples]
    assert [sample.response_length for sample in samples] == [LONG] * PROMPTS * SAMPLES
    for sample in samples:
        assert sample.rollout_routed_experts is not None
        assert sample.rollout_routed_experts.shape == (len(sample.tokens) - 1, LAYERS, TOP_K)
    [metrics] = run.metrics()
    assert metrics["train/train_rollout_logprob_abs_diff"] < 1e-3
    assert "resum" in run.output() or "preempt" in run.output()

    size = SampleSize(3, LONG, Routing(LAYERS, TOP_K, EXPERTS))
    count = PROMPTS * SAMPLES
    cache = LAYERS * count * 2 * 8 * 2 * 4 * size.tokens * 2  # twice while it grows
    rows = size.tokens
    activations = rows * (2 * LAYERS * HIDDEN * 4 + 2 * ACTIVATION_BYTES + 2 * EXPERT_BYTES)
    bounds = {
        "rollout-0": cache
        + rollout_bytes(size, running_samples=2 * count, groups_being_put=2, samples_per_group=2)
        + 2 * 4 * HEADS * 2048 * rows,  # scores of a chunk of a prompt that is computed again
        "redis": 2 * redis_bytes(size, samples_per_group=SAMPLES, queued_groups=PROMPTS, running_groups=PROMPTS),
        "trainer-0": first_rank_bytes(size, samples=count, ranks=1)
        + step_bytes(size, samples=count, replicas=1)
        + activations
        + 3 * rows * VOCAB * 4,
    }
    for name, growth in grown(run, peaks.found, short_peaks.found).items():
        assert growth <= bounds.get(name, count * size.light_bytes) + SLACK_BYTES, (name, growth, bounds.get(name))
