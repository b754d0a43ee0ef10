"""An EAGLE-3 head from nothing for a model, trained on its own answers to the prompts of a task.

    python -m benchmarks.gpu.draft_head --policy .cache/smollm2-135m-instruct --out .cache/head
    python -m examples.smollm2_chain_sum.enlarge_head --head .cache/head --out .cache/large-head

What the model would say, and its hidden states, are recorded as the trainer records them, and the head learns from them
for `--seconds`, as the draft trainer would, with a fifth of the learning rate in the last third of the time. A model
that was enlarged takes the head of the small one, enlarged too.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.draft_tasks import TASKS
from miles.algorithms.any_shape_attention import leave_out_cudnn
from miles.drafts.eagle3_training import TrainableHead
from miles.drafts.new_head import write_new_head
from miles.drafts.recorded_layers import EMBEDDING, aux_layers
from miles.drafts.recording import RecordedSample
from miles.services.trainer.drafts.learner import DraftLearner, LearnerOptions

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""Of the recipe smollm2_chain_sum."""
TOP_TOKENS = 32
BATCH_TOKENS = 16384
LAST, LAST_RATE = 1 / 3, 1 / 5
"""Share of the time, and of the learning rate then."""
ROWS = 4096
"""Rows whose logits are in memory at a time."""
Answer = tuple[list[int], list[int]]
"""Prompt and response, as tokens."""


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, texts: Sequence[str], tokens: int, batch: int, temperature: float
) -> list[Answer]:
    """A sampled response to each prompt, of at most so many tokens."""
    tokenizer.padding_side, tokenizer.pad_token_id = "left", tokenizer.eos_token_id
    found: list[Answer] = []
    for start in range(0, len(texts), batch):
        part = [TEMPLATE.format(text) for text in texts[start : start + batch]]
        encoded = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        whole = model.generate(
            **encoded, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        width = encoded.input_ids.shape[1]
        for prompt, mask, row in zip(encoded.input_ids, encoded.attention_mask, whole[:, width:].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            found.append((prompt[mask.bool()].tolist(), row[:end]))
    return found


@torch.no_grad()
def record(
    policy: Any, given: Sequence[Answer], layers: Sequence[int], temperature: float, batch: int
) -> list[RecordedSample]:
    """What the trainer would record of these samples, with hidden states on the policy's device."""
    samples: list[RecordedSample] = []
    by_length = sorted(given, key=lambda each: len(each[0]) + len(each[1]))
    for start in range(0, len(by_length), batch):
        samples += _recorded(policy, by_length[start : start + batch], layers, temperature)
    return samples


def _recorded(policy: Any, part: Sequence[Answer], layers: Sequence[int], temperature: float) -> list[RecordedSample]:
    """Of one forward pass."""
    rows = [torch.tensor(prompt + response) for prompt, response in part]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(policy.device)
    # Attention is causal, so what is padded behind changes nothing.
    out = policy.model(input_ids=ids, output_hidden_states=True)
    read = {layer: out.hidden_states[layer + 1] for layer in layers} | {EMBEDDING: policy.get_input_embeddings()(ids)}
    samples = []
    for i, (prompt, response) in enumerate(part):
        first, end = len(prompt) - 1, len(prompt) + len(response) - 1
        top = [
            (each.float() / temperature).log_softmax(-1).topk(TOP_TOKENS)
            for each in map(policy.lm_head, out.last_hidden_state[i, first:end].split(ROWS))
        ]
        samples.append(
            RecordedSample(
                tokens_T=rows[i],
                prompt_length=len(prompt),
                hidden_TD={layer: each[i, :end].clone() for layer, each in read.items()},
                top_tokens_RK=torch.cat([each.indices for each in top]).cpu(),
                top_log_probs_RK=torch.cat([each.values for each in top]).cpu(),
                loss_mask_R=torch.ones(len(response), dtype=torch.bool),
            )
        )
    return samples


def learner_of(folder: pathlib.Path, layers: Sequence[int], args: argparse.Namespace, rate: float) -> DraftLearner:
    """A learner of the head of a folder."""
    how = {"loss": "kl", "unroll_steps": args.steps, "temperature": args.temperature}
    head = TrainableHead(folder, layers, device=torch.device(args.device), **how)
    return DraftLearner(head, LearnerOptions(rate, BATCH_TOKENS, 1, torch.bfloat16))


def learn(learner: DraftLearner, samples: Sequence[RecordedSample], seconds: float) -> list[dict[str, float]]:
    """Pass over the samples until the time is up; what each optimizer step said.

    From the second pass on that is of samples which it had learnt from.
    """
    said: list[dict[str, float]] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for metrics in learner.learn(samples):
            said.append(dict(metrics))
            if time.monotonic() >= until:
                break
    return said


def main() -> None:
    """Write the head, and print how it came about."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--task", default="rare-words", choices=list(TASKS))
    parser.add_argument("--samples", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of a response")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--batch", type=int, default=384, help="responses at a time")
    parser.add_argument("--record-batch", type=int, default=64, help="samples of a pass that records")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--steps", type=int, default=3, help="drafts of a chain")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    torch.manual_seed(0)
    leave_out_cudnn()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    began = time.monotonic()
    policy: Any = AutoModelForCausalLM.from_pretrained(args.policy, dtype=dtype).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    texts = TASKS[args.task].texts(args.samples, 1)
    given = answers(policy, tokenizer, texts, args.tokens, args.batch, args.temperature)
    print(f"{sum(len(r) for _, r in given)} tokens answered after {time.monotonic() - began:.0f} s", flush=True)
    write_new_head(args.policy, args.out)
    layers = aux_layers(str(args.out), policy.config.num_hidden_layers)
    samples = record(policy, given, layers, args.temperature, args.record_batch)
    del policy
    print(f"recorded after {time.monotonic() - began:.0f} s", flush=True)
    learner = learner_of(args.out, layers, args, args.learning_rate)
    said = learn(learner, samples, args.seconds * (1 - LAST))
    last = learner_of(args.out, layers, args, args.learning_rate * LAST_RATE)
    last.load_state(learner.state())
    said += learn(last, samples, args.seconds * LAST)
    last.save(args.out)
    for part in (said[:3], said[-8:]):
        print(json.dumps({name: statistics.mean(each[name] for each in part) for name in part[0]}), flush=True)
    print(f"{len(said)} optimizer steps; {args.out} written after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
