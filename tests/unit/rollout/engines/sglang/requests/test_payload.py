from __future__ import annotations

import pytest

from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
from miles.services.rollout.engines.sglang.requests.payload import to_payload

REQUEST = GenerationRequest("r", [1, 2, 3], SamplingParams(max_new_tokens=9, temperature=0.7, seed=5), resumed_tokens=1)


def test_a_request_names_every_parameter_that_changes_what_is_drawn() -> None:
    params = to_payload(REQUEST, "r", cache_key="v1", seeded=True)["sampling_params"]
    preferred = {
        "top_p": 0.5, "top_k": 3, "min_p": 0.2, "repetition_penalty": 1.2, "frequency_penalty": 0.5,
        "presence_penalty": 0.5, "logit_bias": {"1": 5.0}, "ignore_eos": True, "regex": "a*", "json_schema": "{}",
        "ebnf": "root ::= 'a'", "structural_tag": "{}", "stop_regex": "a", "custom_params": {"x": 1}, "beam_width": 4,
        "n": 2, "min_new_tokens": 3, "temperature": 0.1, "max_new_tokens": 1,
    }  # fmt: skip
    served = {**preferred, **params}  # what the server does with the preferences that it was started with
    plain = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0}
    plain |= {"presence_penalty": 0.0, "ignore_eos": False, "n": 1, "min_new_tokens": 0}
    plain |= {"temperature": 0.7, "max_new_tokens": 8}
    assert {name: served[name] for name in preferred} == {**dict.fromkeys(preferred), **plain}


@pytest.mark.parametrize("seeded", [True, False])
def test_a_seed_is_sent_to_servers_that_honour_it(seeded: bool) -> None:
    params = to_payload(REQUEST, "r", cache_key="v1", seeded=seeded)["sampling_params"]
    assert params.get("sampling_seed") == (5 if seeded else None)
