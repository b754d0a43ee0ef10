"""How a draft falls behind a policy that learns, and what training it beside the policy changes, step by step.

    python -m benchmarks.draft_drift
    python -m benchmarks.draft_drift --num-rollout 40 --lr 5e-4

Whole runs of train.py on the CPU, all services included: the same GRPO run with a draft that stays as it is (frozen)
and with one that is trained beside the policy (online). The policy is a tiny model that counts: after each digit comes
the next one, four times out of five, or the one three further. Its reward is the share of threes, so that it learns to
say something else at every position. The draft, a small language model, starts as a copy of the policy.

`threes` is the mean reward, `KL` the mean divergence from the initial policy (k1, nats a token). `frozen` and `online`
are the mean tokens per verification, at most one more than the steps that are drafted; in the last step of a draft that
keeps up it is where it began. Responses depend on weights, prompts and seeds alone, so both runs train the same policy,
which is checked. Further flags go to train.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from examples.tiny.make import VOCABULARY, make_model, make_tokenizer
from miles.types import Sample

MODES: dict[str, dict[str, Any]] = {
    "frozen": {},
    "online": {
        "enable_draft_training": True,
        "draft_learning_rate": 3e-3,
        "draft_batch_tokens": 1024,
        "draft_passes": 2,
        "draft_recordings_kept": 100,
    },
}
"""Settings of each run that the other does not have."""
DRAFT_STEPS = 3
PROMPTS, PROMPT_DIGITS, RESPONSE_TOKENS = 512, 3, 32
USUAL, REWARDED = 1, 3
"""What the policy adds to a digit at first, and what it is rewarded for."""
_USUALLY = 0.8


async def share_of_threes(sample: Sample) -> float:
    """The share of digits of a response that are REWARDED above the digit before, modulo 10."""
    digits = [int(character) for character in sample.response if character.isdigit()]
    rises = [(after - before) % 10 for before, after in itertools.pairwise(digits)]
    return rises.count(REWARDED) / max(1, len(rises))


def make(folder: pathlib.Path, *, seed: int = 0, steps: int = 60, batch: int = 16) -> float:
    """Write `folder`/model, `folder`/draft (the same) and `folder`/train.jsonl; returns the last loss, in nats a token.

    Takes some seconds on one core. Touches torch's global generator.
    """
    rng = random.Random(seed)
    prompts = ["".join(str(rng.randint(0, 9)) for _ in range(PROMPT_DIGITS)) + ">" for _ in range(PROMPTS)]
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": prompt, "label": "", "metadata": {}} for prompt in prompts]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(seed)
    model = make_model(moe=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    loss = torch.zeros(())
    for step in range(steps):
        tokens_BT = torch.tensor([_counted(rng) for _ in range(batch)])
        logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits[:, PROMPT_DIGITS:]
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, PROMPT_DIGITS + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 2 * (1 - step / steps))
        optimizer.step()
    for name in ("model", "draft"):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return loss.item()


def _counted(rng: random.Random) -> list[int]:
    """Tokens of a prompt and of a response as the policy gives it at first, which never ends by itself."""
    index = {token: i for i, token in enumerate(VOCABULARY)}
    digits = [rng.randint(0, 9) for _ in range(PROMPT_DIGITS)]
    for _ in range(RESPONSE_TOKENS):
        digits.append((digits[-1] + (USUAL if rng.random() < _USUALLY else REWARDED)) % 10)
    text = [str(digit) for digit in digits]
    return [index[token] for token in (*text[:PROMPT_DIGITS], ">", *text[PROMPT_DIGITS:])]


def settings(folder: pathlib.Path, mode: str, steps: int) -> dict[str, Any]:
    """Settings of a run on what `make` wrote to `folder`.

    The learning rate falls to 0 at two thirds of the run, so that a draft that is published some steps later, as on a
    busy machine, can still be seen to arrive.
    """
    return {
        "device": "cpu",
        "hf_checkpoint": str(folder / "model"),
        "prompt_data": str(folder / "train.jsonl"),
        "input_key": "prompt",
        "label_key": "label",
        "custom_rm_path": "benchmarks.draft_drift.share_of_threes",
        "num_rollout": steps,
        "rollout_batch_size": 8,
        "n_samples_per_prompt": 16,
        "rollout_max_response_len": RESPONSE_TOKENS,
        "rollout_dtype": "float32",
        "rollout_backend": "torch",
        "train_dtype": "float32",
        "max_running_requests": 128,
        "lr": 2e-3,
        "lr_decay_style": "linear",
        "lr_decay_iters": steps * 2 // 3,
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 8192,
        "calculate_per_token_loss": True,
        "sglang_speculative_algorithm": "STANDALONE",
        "sglang_speculative_draft_model_path": str(folder / "draft"),
        "sglang_speculative_num_steps": DRAFT_STEPS,
        "sglang_speculative_adaptive": False,
        **MODES[mode],
    }


def run(folder: pathlib.Path, mode: str, steps: int, more: Sequence[str]) -> list[dict[str, Any]]:
    """Train to the end; returns the metrics of each step."""
    run_dir = folder / mode
    config = folder / f"{mode}.yaml"
    config.write_text(json.dumps(settings(folder, mode, steps)))
    command = [sys.executable, "train.py", f"--config={config}", f"--run-dir={run_dir}", "--use-kl-loss", *more]
    log = run_dir.with_suffix(".log")
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    if code != 0:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-4000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "rollout/raw_reward" in line]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rollout", type=int, default=24, help="steps of each run")
    flags, more = parser.parse_known_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make(folder)
        frozen, online = (run(folder, mode, flags.num_rollout, more) for mode in MODES)
    rewards = [[line["rollout/raw_reward"] for line in lines] for lines in (frozen, online)]
    if rewards[0] != rewards[1]:
        raise SystemExit(f"the runs trained different policies: rewards {rewards[0]} and {rewards[1]}")
    print("step  threes     KL  frozen  online  draft version")
    for before, after in zip(frozen, online, strict=True):
        lengths = [line["rollout/spec_accept_length"] for line in (before, after)]
        version = after.get("speculative/draft_version")
        print(
            f"{before['step']:4}  {before['rollout/raw_reward']:6.3f}  {before['train/kl_loss']:5.2f}  "
            f"{lengths[0]:6.2f}  {lengths[1]:6.2f}  {'-' if version is None else int(version):>13}"
        )


if __name__ == "__main__":
    main()
