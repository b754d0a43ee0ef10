"""The EAGLE-3 head (Li et al. 2025, arXiv 2503.01840), as SGLang's models/llama_eagle3.py computes and names it.

Row t of a sample reads the policy's hidden states at position t, fused by `fc`, and the embedding of token t + 1, and
predicts token t + 2. Where the policy has not been yet, the head's own output of the row before, before its last norm,
takes the place of the fused hidden states.

Dims: N rows, D hidden size, H heads, K kv heads, C elements of a head, V tokens of the draft's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from miles.drafts.head_config import features, head_config

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of one layer (its number) over whatever rows a caller knows: queries [N, H, C], keys and values [N, K, C],
rotated, to outputs [N, H, C]. Training and serving differ in this alone."""


class HeadAttention(nn.Module):
    """Projections and rotation of one layer; the attention itself is the caller's."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = index, int(config.head_dim)
        size = config.hidden_size * (2 if index == 0 else 1)
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, input_NE: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], attend: Attend) -> Any:
        """[N, E] to [N, D]; E is 2 D in the first layer, which reads embeddings and hidden states side by side."""
        query, key, value = (
            project(input_NE).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = attend(self.layer_idx, rotate(query, rotation), rotate(key, rotation), value)
        return self.o_proj(output.flatten(-2))


class HeadLayer(nn.Module):
    """A decoder layer of Llama; the first one also reads the embeddings of the next tokens."""

    def __init__(self, config: Any, index: int) -> None:
        from transformers.models.llama.modeling_llama import LlamaMLP

        super().__init__()
        self.self_attn = HeadAttention(config, index)
        mlp: Any = LlamaMLP
        self.mlp: nn.Module = mlp(config)
        if index == 0:
            self.input_layernorm = norm(config)
        self.hidden_norm = norm(config)
        self.post_attention_layernorm = norm(config)
        self.reads_embeddings = index == 0

    def forward(
        self,
        hidden_ND: torch.Tensor,
        embeds_ND: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        """The residual stream behind the layer, [N, D]."""
        read = self.hidden_norm(hidden_ND)
        if self.reads_embeddings:
            read = torch.cat([self.input_layernorm(embeds_ND), read], dim=-1)
        hidden_ND = hidden_ND + self.self_attn(read, rotation, attend)
        added_ND: torch.Tensor = self.mlp(self.post_attention_layernorm(hidden_ND))
        return hidden_ND + added_ND


class Eagle3Head(nn.Module):
    """The head without the embeddings, which are the policy's own. Its parameters are on the meta device at first.

    Args:
        config: config.json of its folder.
        dtype: Type of its parameters; positions are rotated by angles in float32.

    Raises ValueError for heads of another form.
    """

    def __init__(self, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        super().__init__()
        self.config = head_config(config)
        size = int(self.config.hidden_size)
        with torch.device("meta"):  # what nn.Linear draws takes long for a vocabulary, and is written over
            self.fc = nn.Linear(features(config) * size, size, bias=False)
            self.layers = nn.ModuleList(HeadLayer(self.config, i) for i in range(self.config.num_hidden_layers))
            self.norm = norm(self.config)
            self.lm_head = nn.Linear(size, int(self.config.draft_vocab_size), bias=False)
        self.to(dtype)
        self.rotary = LlamaRotaryEmbedding(self.config)

    def forward(
        self, hidden_ND: torch.Tensor, embeds_ND: torch.Tensor, positions_N: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """The residual stream behind the last layer, [N, D], which the row behind each may read in place of fc's.

        `hidden_ND`: fc's output, or what this returned for the rows before. `positions_N`: t of each row, int64.
        """
        cos, sin = self.rotary(positions_N.float(), positions_N[None])
        for layer in self.layers:
            hidden_ND = layer(hidden_ND, embeds_ND, (cos[0, :, None], sin[0, :, None]), attend)
        return hidden_ND

    def logits(self, stream_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] over the draft's vocabulary of what `forward` returned."""
        logits_NV: torch.Tensor = self.lm_head(self.norm(stream_ND))
        return logits_NV


def norm(config: Any) -> nn.RMSNorm:
    """A root-mean-square norm as the configuration has them."""
    return nn.RMSNorm(int(config.hidden_size), eps=float(config.rms_norm_eps))


def rotate(input_NHC: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding with halves (GPT-NeoX style), [N, H, C]; cosine and sine are float32 [N, 1, C]."""
    cos, sin = rotation
    first, second = input_NHC.chunk(2, dim=-1)
    return (input_NHC * cos + torch.cat([-second, first], dim=-1) * sin).to(input_NHC.dtype)
