"""The head against SGLang's arithmetic (srt/models/llama_eagle3.py), written out row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from miles.drafts.eagle3 import Eagle3Head
from miles.drafts.head_config import ARCHITECTURE, head_config
from miles.drafts.packed_batch import pack
from miles.drafts.recording import RecordedSample
from miles.drafts.unrolled_attention import PackedRows, UnrolledAttention

SIZE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, THETA, EPS = 16, 4, 2, 6, 20, 500.0, 1e-5
STEPS = 4
Weights = dict[str, torch.Tensor]


def config_of(layers: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE], "hidden_size": SIZE, "intermediate_size": 24, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": EPS,
        "vocab_size": VOCABULARY, "draft_vocab_size": VOCABULARY, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "num_aux_hidden_states": 3,
    } | changes  # fmt: skip


def random_head(layers: int) -> Eagle3Head:
    torch.manual_seed(0)
    head = Eagle3Head(config_of(layers), torch.float64)
    weights = {
        name: 1 + torch.randn(weight.shape).double() * 0.3
        if "norm" in name
        else torch.randn(weight.shape).double() * 0.4
        for name, weight in head.named_parameters()
    }
    head.load_state_dict(weights, assign=True)
    return head


class Reference:
    """One sequence of rows, each with the keys and values of those before it."""

    def __init__(self, weights: Weights, layers: int) -> None:
        self.weights, self.layers = weights, layers
        self.cache: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(layers)]

    def branch(self) -> Reference:
        """Another one that goes on from here."""
        other = Reference(self.weights, self.layers)
        other.cache = [list(rows) for rows in self.cache]
        return other

    def row(self, position: int, embed: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and what stands in for hidden states in the next row."""
        residual = torch.zeros_like(hidden)
        for i in range(self.layers):
            prefix = f"layers.{i}."
            residual = hidden + residual
            read = self.norm(residual, prefix + "hidden_norm")
            if i == 0:
                read = torch.cat([self.norm(embed, prefix + "input_layernorm"), read])
            residual = residual + self.attention(i, position, read)
            inner = self.norm(residual, prefix + "post_attention_layernorm")
            gate = self.weights[prefix + "mlp.gate_proj.weight"] @ inner
            up = self.weights[prefix + "mlp.up_proj.weight"] @ inner
            hidden = self.weights[prefix + "mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
        residual = hidden + residual
        return self.weights["lm_head.weight"] @ self.norm(residual, "norm"), residual

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean() + EPS) * self.weights[name + ".weight"]

    def attention(self, layer: int, position: int, read: torch.Tensor) -> torch.Tensor:
        def heads(name: str, count: int) -> torch.Tensor:
            return (self.weights[f"layers.{layer}.self_attn.{name}_proj.weight"] @ read).view(count, HEAD_DIM)

        query, key = (self.rotate(heads(n, c), position) for n, c in (("q", HEADS), ("k", KV_HEADS)))
        self.cache[layer].append((key, heads("v", KV_HEADS)))
        outputs = []
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = torch.stack([query[head] @ key[kv] for key, _ in self.cache[layer]]) / HEAD_DIM**0.5
            outputs.append(
                sum(w * value[kv] for w, (_, value) in zip(scores.softmax(0), self.cache[layer], strict=True))
            )
        return self.weights[f"layers.{layer}.self_attn.o_proj.weight"] @ torch.cat(outputs)

    @staticmethod
    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        """Pairs (i, i + half) of each head turn by position * theta ** (-2 i / dim)."""
        half = HEAD_DIM // 2
        angle = position * THETA ** (-2 * torch.arange(half, dtype=torch.float64) / HEAD_DIM)
        first, second = x[:, :half], x[:, half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )


def sample_of(length: int, generator: torch.Generator) -> RecordedSample:
    """Random hidden states of three layers, and embeddings."""
    states = {i: torch.randn(length - 1, SIZE, generator=generator, dtype=torch.float64) for i in (-1, 0, 1, 2)}
    return RecordedSample(
        tokens_T=torch.randint(VOCABULARY, (length,), generator=generator),
        prompt_length=2,
        hidden_TD=states,
        top_tokens_RK=torch.zeros(length - 2, 1, dtype=torch.int64),
        top_log_probs_RK=torch.zeros(length - 2, 1),
        loss_mask_R=torch.ones(length - 2, dtype=torch.bool),
    )


@pytest.mark.parametrize("layers", [1, 2])
def test_a_packed_unrolled_pass_is_what_serving_computes_row_by_row(layers):
    """Of every row as the last before a draft, and of every step of that draft."""
    generator = torch.Generator().manual_seed(1)
    samples = [sample_of(length, generator) for length in (9, 3, 14, 8)]
    head = random_head(layers)
    weights = {name: weight.detach() for name, weight in head.named_parameters()}

    batch = pack(samples, (0, 1, 2), STEPS, torch.device("cpu"))
    attention = UnrolledAttention(batch.rectangles)
    with torch.no_grad():
        hidden = head.fc(batch.hidden_NF.double())
        streams = [
            hidden := head(hidden, batch.embeds_ND(step).double(), batch.positions_N + step, attention)
            for step in range(STEPS)
        ]
        logits = [head.logits(stream) for stream in streams]

    first = 0
    for sample in samples:
        rows = len(sample.tokens_T) - 2
        embeds = sample.hidden_TD[-1].float().double()
        serving = Reference(weights, layers)
        for t in range(rows):
            read = torch.cat([sample.hidden_TD[i][t] for i in (0, 1, 2)]).float().double()
            found, state = serving.row(t, embeds[t + 1], weights["fc.weight"] @ read)
            drafting = serving.branch()
            for step in range(STEPS):
                if step:
                    if t + 1 + step >= len(embeds):
                        break
                    found, state = drafting.row(t + step, embeds[t + 1 + step], state)
                torch.testing.assert_close(logits[step][first + t], found, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(streams[step][first + t], state, rtol=1e-4, atol=1e-4)
        first += rows


def test_gradients_of_packed_attention_are_those_of_each_sample_alone() -> None:
    """Samples of unlike lengths share a rectangle, and others have one of their own."""
    lengths, generator = (9, 3, 14, 8, 11), torch.Generator().manual_seed(1)
    shapes = [(heads, HEAD_DIM) for _ in range(STEPS) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    packed = [torch.randn(sum(lengths), *shape, generator=generator).double() for shape in shapes]
    weights = torch.randn(STEPS, sum(lengths), HEADS, HEAD_DIM, generator=generator).double()

    def gradients(inputs: list[torch.Tensor], weights_N: torch.Tensor, rows: PackedRows) -> list[torch.Tensor]:
        leaves = [each.clone().requires_grad_() for each in inputs]
        attention = UnrolledAttention(rows)
        outputs = [attention(0, *leaves[3 * step : 3 * step + 3]) for step in range(STEPS)]
        (torch.stack(outputs) * weights_N).sum().backward()
        return [each.grad for each in leaves if each.grad is not None]

    cpu = torch.device("cpu")
    rows = PackedRows(lengths, cpu)
    assert 1 < len(rows.shapes) < len(lengths)
    found = [torch.split(each, lengths) for each in gradients(packed, weights, rows)]
    for i, length in enumerate(lengths):
        own = [torch.split(each, lengths)[i] for each in packed]
        expected = gradients(own, torch.split(weights, lengths, dim=1)[i], PackedRows([length], cpu))
        for together, alone in zip(found, expected, strict=True):
            torch.testing.assert_close(together[i], alone)


def test_angles_are_in_float32_whatever_the_weights_are_in():
    head = Eagle3Head(config_of(), torch.bfloat16)
    assert (head.fc.weight.dtype, head.rotary.inv_freq.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"draft_vocab_size": None}, "no lm_head of its own"),
        ({"fc_norm": True}, "fc_norm"),
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc"),
        ({"target_hidden_size": 32}, "target_hidden_size is 32"),
        ({"num_aux_hidden_states": 1}, "one hidden state"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_heads_of_other_forms_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        head_config(config_of(**changes))
