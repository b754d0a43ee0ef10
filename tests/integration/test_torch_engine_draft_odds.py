"""What drafts may see of the policy, and that drafted responses are distributed as the policy says."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch_drafts import Driver, Oracle, futures, request_of
from torch_engine_models import prompt_of, save_checkpoint, weights_of

pytestmark = pytest.mark.engine


def test_hidden_states_of_kept_positions_are_those_of_the_model(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "qwen3")
    asked = [request_of(str(i), prompt_of(30, i), seed=i) for i in range(3)]
    future = futures(Driver(tmp_path, weights_of(model), None).run(*asked))
    oracle = Oracle(future, layers=(1, 0))
    Driver(tmp_path, weights_of(model), lambda _: oracle, max_prefill_tokens=13).run(*asked)
    for request in asked:
        tokens = torch.tensor([[*request.input_ids, *future[request.request_id]]])
        with torch.no_grad():
            expected = model(input_ids=tokens, output_hidden_states=True).hidden_states
        states = {layer: torch.cat(parts) for layer, parts in oracle.hidden[request.request_id].items()}
        length = states[0].shape[0]
        assert length >= tokens.shape[1] - 5
        torch.testing.assert_close(states[0], expected[1][0, :length], atol=1e-4, rtol=1e-4)


def test_drafted_responses_are_distributed_as_the_policy_says(tmp_path: pathlib.Path) -> None:
    """Chi-square of all responses of three tokens out of the three likeliest, where the second is always drafted."""
    model = save_checkpoint(tmp_path, "llama", initializer_range=0.15)
    prompt = prompt_of(10)
    odds: dict[tuple[int, ...], float] = {}
    likeliest = {}
    for first, p in _top(model, prompt):
        likeliest[first] = _top(model, [*prompt, first])
        for second, q in likeliest[first]:
            for third, r in _top(model, [*prompt, first, second]):
                odds[first, second, third] = p * q * r

    class Stubborn(Oracle):
        def propose(self, requests: Any, steps: int) -> list[list[int]]:
            return [[likeliest.get(request.tokens[-1], [(0, 1)])[0][0]] for request in requests]

    count = 3000
    driver = Driver(tmp_path, weights_of(model), lambda _: Stubborn({}), max_running_requests=64)
    responses = driver.run(*(request_of(str(i), prompt, seed=i, top_k=3, max_new_tokens=3) for i in range(count)))
    assert driver.generator.drafting is not None
    (counts,) = driver.generator.drafting.state.counts
    assert 0.2 < counts.accepted_draft_tokens / counts.proposed_draft_tokens < 0.9
    seen = dict.fromkeys(odds, 0)
    for response in responses.values():
        seen[tuple(response.tokens)] += 1
    chi_square = sum((seen[key] - count * p) ** 2 / (count * p) for key, p in odds.items())
    assert chi_square < 54.05, "1 in 1000 at 26 degrees of freedom"


def _top(model: torch.nn.Module, tokens: Sequence[int]) -> list[tuple[int, float]]:
    """The three likeliest next tokens and their shares of one another, likeliest first."""
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]
    top, ids = logits_V.topk(3)
    return list(zip(ids.tolist(), top.double().softmax(-1).tolist(), strict=True))
