"""Make tiny models that can sort five digits some of the time, and the prompts to improve them on.

    python examples/tiny/make.py                          # into .cache/tiny, where the configs look for it

The dense Qwen3 and the Qwen3-MoE (8 experts, top-2) have a character-level tokenizer and about 120 000 and 220 000
parameters. They are trained from scratch on answers of which 30 % are right and 70 % sorted the wrong way round: they
know both and prefer the wrong one, which is what reinforcement learning then changes. The same seed gives the same
files on the same machine.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

PAD, END = "<pad>", "<end>"
VOCABULARY = [PAD, END, *"0123456789>"]
DIGITS = 5
HIDDEN = 64
RIGHT = 0.3
"""Share of right answers in the warm-up, and so about the accuracy of sampled responses after it."""
DEFAULT_FOLDER = pathlib.Path(".cache/tiny")
TRAIN_PROMPTS, EVAL_PROMPTS = 4096, 64


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character; plain text needs no template, and messages are rendered as their texts with a > behind."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    made.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    return made


def make_model(*, moe: bool) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    """A model with random weights, float32, drawn from torch's global generator."""
    shape: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": VOCABULARY.index(END),
        "pad_token_id": VOCABULARY.index(PAD),
    }
    if not moe:
        return Qwen3ForCausalLM(Qwen3Config(**shape))
    experts: dict[str, Any] = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": HIDDEN,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts))


def draw(rng: random.Random) -> tuple[str, str]:
    """A prompt such as "31524>" and its right answer "12345"."""
    digits = [str(rng.randint(0, 9)) for _ in range(DIGITS)]
    return "".join(digits) + ">", "".join(sorted(digits))


def warm_up(model: Qwen3ForCausalLM | Qwen3MoeForCausalLM, rng: random.Random, *, steps: int, batch: int) -> float:
    """Supervised training on answers of which `RIGHT` are right; returns the last loss, in nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 4 * (1 - step / steps)))
    index = {token: i for i, token in enumerate(VOCABULARY)}
    loss = torch.zeros(())
    for _ in range(steps):
        rows = []
        for _ in range(batch):
            prompt, answer = draw(rng)
            answer = answer if rng.random() < RIGHT else answer[::-1]
            rows.append([index[character] for character in prompt + answer] + [index[END]])
        tokens_BT = torch.tensor(rows)
        logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits[:, DIGITS:]
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, DIGITS + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()


def write_prompts(path: pathlib.Path, count: int, rng: random.Random) -> None:
    """A JSONL file with the columns prompt (text), label and metadata."""
    rows = [{"prompt": prompt, "label": answer, "metadata": {}} for prompt, answer in (draw(rng) for _ in range(count))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder: pathlib.Path, *, moe: bool, seed: int = 0, steps: int = 400, batch: int = 64) -> float:
    """Write a Hugging Face checkpoint with tokenizer to `folder`/model, and `folder`/train.jsonl and eval.jsonl.

    Takes some seconds on one core. Returns the last loss of the warm-up. Touches torch's global generator.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "train.jsonl", TRAIN_PROMPTS, random.Random(seed + 1))
    write_prompts(folder / "eval.jsonl", EVAL_PROMPTS, random.Random(seed + 2))
    torch.manual_seed(seed)
    model = make_model(moe=moe).train()
    loss = warm_up(model, random.Random(seed), steps=steps, batch=batch)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return loss


def main(arguments: Sequence[str] | None = None) -> None:
    """Make both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=DEFAULT_FOLDER, help="folder for dense/ and moe/")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)  # matrices this small only wait for each other on more
    for name, moe in (("dense", False), ("moe", True)):
        loss = make(flags.out / name, moe=moe, seed=flags.seed)
        print(f"{flags.out / name}: loss {loss:.3f} nats a token after the warm-up")


if __name__ == "__main__":
    main()
