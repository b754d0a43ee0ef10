"""An EAGLE-3 head from nothing for a policy of which a small model gives the same answers, trained on these.

    python -m examples.smollm2_chain_sum.enlarge --model .cache/smollm2-135m-instruct --out .cache/large
    python -m benchmarks.gpu.draft_head --policy .cache/large --answers .cache/smollm2-135m-instruct --out .cache/head

The small model (it may be the policy) answers prompts of `--task`; the policy's hidden states and likeliest tokens over
these are recorded as the trainer records them, and the head learns from them for `--seconds`, as the draft trainer
would.
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
from miles.drafts.eagle3_training import TrainableHead
from miles.drafts.new_head import write_new_head
from miles.drafts.recorded_layers import EMBEDDING, aux_layers
from miles.drafts.recording import RecordedSample
from miles.services.trainer.drafts.learner import DraftLearner, LearnerOptions

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""Of the recipe smollm2_chain_sum."""
TOP_TOKENS = 32
BATCH_TOKENS = 16384
ROWS = 4096
"""Rows whose logits are in memory at a time."""
Answer = tuple[list[int], list[int]]
"""Prompt and response, as tokens."""


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, texts: Sequence[str], tokens: int, batch: int, temperature: float = 1.0
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
    policy: Any, given: Sequence[Answer], layers: Sequence[int], temperature: float = 1.0
) -> list[RecordedSample]:
    """What the trainer would record of these samples, with hidden states on the policy's device."""
    device, samples = policy.device, []
    for prompt, response in given:
        ids = torch.tensor([prompt + response], device=device)
        out = policy.model(input_ids=ids, output_hidden_states=True)
        last = out.last_hidden_state[0, len(prompt) - 1 : -1]
        top = [
            (part.float() / temperature).log_softmax(-1).topk(TOP_TOKENS)
            for part in map(policy.lm_head, last.split(ROWS))
        ]
        hidden = {layer: out.hidden_states[layer + 1][0, :-1] for layer in layers}
        samples.append(
            RecordedSample(
                tokens_T=ids[0].cpu(),
                prompt_length=len(prompt),
                hidden_TD=hidden | {EMBEDDING: policy.get_input_embeddings()(ids)[0, :-1]},
                top_tokens_RK=torch.cat([each.indices for each in top]).cpu(),
                top_log_probs_RK=torch.cat([each.values for each in top]).cpu(),
                loss_mask_R=torch.ones(len(response), dtype=torch.bool),
            )
        )
    return samples


def learner_of(folder: pathlib.Path, layers: Sequence[int], device: str, steps: int, rate: float) -> DraftLearner:
    """A learner of the head of a folder."""
    head = TrainableHead(folder, layers, loss="kl", unroll_steps=steps, device=torch.device(device))
    return DraftLearner(head, LearnerOptions(rate, BATCH_TOKENS, 1, torch.bfloat16))


def learn(learner: DraftLearner, samples: Sequence[RecordedSample], seconds: float) -> list[dict[str, float]]:
    """Pass over the samples until the time is up; what each optimizer step said."""
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
    parser.add_argument("--answers", type=pathlib.Path, required=True, help="folder of the model that answers")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--task", default="rare-words", choices=list(TASKS))
    parser.add_argument("--samples", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of a response")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=384, help="responses at a time")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--steps", type=int, default=3, help="drafts of a chain")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    began = time.monotonic()
    small = AutoModelForCausalLM.from_pretrained(args.answers, dtype=dtype).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.answers)
    texts = TASKS[args.task].texts(args.samples, 1)
    given = answers(small, tokenizer, texts, args.tokens, args.batch, args.temperature)
    print(f"{sum(len(r) for _, r in given)} tokens answered after {time.monotonic() - began:.0f} s", flush=True)
    del small
    write_new_head(args.policy, args.out)
    policy: Any = AutoModelForCausalLM.from_pretrained(args.policy, dtype=dtype).to(args.device)
    layers = aux_layers(str(args.out), policy.config.num_hidden_layers)
    samples = record(policy, given, layers, args.temperature)
    del policy
    print(f"recorded after {time.monotonic() - began:.0f} s", flush=True)
    learner = learner_of(args.out, layers, args.device, args.steps, args.learning_rate)
    said = learn(learner, samples, args.seconds)
    learner.save(args.out)
    for part in (said[:3], said[-8:]):
        print(json.dumps({name: statistics.mean(each[name] for each in part) for name in part[0]}), flush=True)
    print(f"{len(said)} optimizer steps; {args.out} written after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
