"""Tiny models and random rollouts for the trainer's tests."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from miles.config import JobConfig
from miles.services.trainer.batch.rollout_batch import RolloutBatch
from miles.services.trainer.step.sample_log import TokenMetrics
from miles.services.trainer.step.sample_recording import recorded_samples
from miles.services.trainer.step.training_step import RolloutTrainer
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan

VOCAB = 97


def write_dense_model(folder: pathlib.Path, *, tied: bool = True, layers: int = 3, **sizes: int) -> pathlib.Path:
    """A Llama of about 60k parameters, unless `sizes` says otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tied, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        **{"hidden_size": 32, "intermediate_size": 48, **sizes},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_moe_model(folder: pathlib.Path) -> pathlib.Path:
    """A Qwen3-MoE of 2 layers with 8 experts, of which 2 are active."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer of one word a token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(folder)


def job_config(model: pathlib.Path, **changes: Any) -> JobConfig:
    """4 prompts × 4 samples in float32, one optimizer step, micro-batches of at most 64 rows."""
    return JobConfig.from_flat(
        {
            "hf_checkpoint": str(model), "prompt_data": "prompts.jsonl", "label_key": "label",
            "rm_type": "exact_match", "num_rollout": 8,
            "rollout_batch_size": 4, "n_samples_per_prompt": 4, "rollout_max_response_len": 12, "lr": 1e-2,
            "use_dynamic_batch_size": True, "max_tokens_per_gpu": 64, "train_dtype": "float32",
            "rollout_dtype": "float32", "device": "cpu", "actor_num_gpus_per_node": 1, "distributed_backend": "gloo",
            "run_dir": str(model.parent / "run"), **changes,
        }
    )  # fmt: skip


def random_groups(
    seed: int, group_ids: Sequence[int] = (0, 1, 2, 3), samples: int = 4, routing: tuple[int, int, int] | None = None
) -> list[SampleGroup]:
    """Groups with prompts of 2–9 and responses of 1–12 tokens; `routing` is (experts, layers, top-k)."""
    groups = []
    for group_id in group_ids:
        rng = np.random.default_rng((seed, group_id))
        prompt = rng.integers(3, VOCAB, rng.integers(2, 10)).astype(np.int32)
        members = [_random_sample(rng, group_id, index, prompt, routing) for index in range(samples)]
        groups.append(SampleGroup("job", group_id, members))
    return groups


def _random_sample(
    rng: np.random.Generator,
    group_id: int,
    index: int,
    prompt: np.ndarray,
    routing: tuple[int, int, int] | None,
) -> Sample:
    length = int(rng.integers(1, 13))
    tokens = np.concatenate([prompt, rng.integers(3, VOCAB, length).astype(np.int32)])
    experts = None
    if routing is not None:
        choices, layers, top_k = routing
        experts = np.stack(
            [[rng.permutation(choices)[:top_k] for _ in range(layers)] for _ in range(len(tokens) - 1)]
        ).astype(np.uint8)
    return Sample(
        group_id=group_id,
        index=index,
        prompt="p",
        tokens=tokens,
        response_length=length,
        response="r",
        reward=float(rng.integers(0, 2)),
        status=SampleStatus.COMPLETED,
        rollout_log_probs=rng.normal(-4, 0.5, length).astype(np.float32),
        rollout_routed_experts=experts,
        weight_versions=(VersionSpan(0, 0, length),),
    )


def hf_log_probs(model: pathlib.Path, groups: list[SampleGroup], temperature: float) -> list[np.ndarray]:
    """Each sample on its own through the stock model."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    result = []
    for sample in (sample for group in groups for sample in group.samples):
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        with torch.no_grad():
            logits = stock(tokens[None]).logits[0, :-1] / temperature
        log_probs = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        result.append(log_probs[sample.prompt_length - 1 :].numpy())
    return result


def train_recorded(
    trainer: RolloutTrainer, groups: list[SampleGroup], step: int = 0
) -> tuple[dict[str, float], dict[tuple[int, int], TokenMetrics]]:
    """Metrics, and by group and index what was known of a sample's tokens; on one rank."""
    found: dict[tuple[int, int], TokenMetrics] = {}

    def record(batch: RolloutBatch, **tokens: Any) -> None:
        for sample, numbers in recorded_samples(batch, len(groups), 0, **tokens):
            assert numbers is not None
            found[sample.group_id, sample.index] = numbers

    return trainer.train(step, groups, lambda progress: None, record), found


def set_own_routing(model: pathlib.Path, groups: list[SampleGroup]) -> None:
    """Give every sample the experts that the stock model chooses for it."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    # Beside Megatron-Core's CPU stand-ins from_pretrained leaves these buffers unset.
    stock.model.rotary_emb = type(stock.model.rotary_emb)(stock.config)
    for sample in (sample for group in groups for sample in group.samples):
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        with torch.no_grad():
            logits = stock(tokens[None, :-1], output_router_logits=True).router_logits
        chosen = torch.stack([layer.softmax(-1).topk(2).indices for layer in logits], dim=1)
        sample.rollout_routed_experts = chosen.numpy().astype(np.uint8)


def divert(groups: list[SampleGroup], every: int) -> float:
    """Change one expert, of one layer, of every n-th token that is trained with; returns their share."""
    count = diverted = 0
    for sample in (sample for group in groups for sample in group.samples):
        experts = sample.rollout_routed_experts
        assert experts is not None
        for row in range(len(experts)):
            if count % every == 0:
                chosen = experts[row, count % experts.shape[1]]
                chosen[0] = next(other for other in range(len(chosen) + 1) if other not in chosen)
                diverted += 1
            count += 1
    return diverted / count
