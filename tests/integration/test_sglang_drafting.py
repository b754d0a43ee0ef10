"""What SGLang itself makes of the tiers and the corpora that its servers are given; needs no server."""

from __future__ import annotations

import json
import pathlib
import subprocess
import textwrap
from typing import Any

import pytest
from sglang_kit import CPU_PYTHON, ON_GPU, have_sglang

from miles.services.rollout.engines.sglang.speculative.adaptive import adaptive_config

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
]


def in_sglang(program: str, *arguments: str) -> Any:
    """What a program prints last, as JSON, in SGLang's environment."""
    done = subprocess.run(
        [str(CPU_PYTHON), "-c", textwrap.dedent(program), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_steps_follow_what_is_accepted_within_the_tiers(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "adaptive.json"
    path.write_text(json.dumps(adaptive_config(3)))
    program = """
        import json, sys
        from sglang.srt.speculative.adaptive_spec_params import AdaptiveSpeculativeParams
        from sglang.srt.speculative.adaptive_spec_params import resolve_candidate_steps_from_config
        made = AdaptiveSpeculativeParams(3, sys.argv[1])
        made.set_cuda_graph_bs([1, 2, 4, 8, 16, 32, 64, 128, 256])
        at_first = {size: made.get_steps_for_batch(size) for size in (1, 31, 32, 64, 128, 300)}
        def after(accepted, size, times=60):
            seen = []
            for _ in range(times):
                made.on_verify_complete([min(accepted, made.get_steps_for_batch(size))] * size, size)
                seen.append(made.get_steps_for_batch(size))
            return seen
        print(json.dumps([resolve_candidate_steps_from_config(sys.argv[1]), at_first, after(0, 4), after(3, 4)]))
    """
    candidates, at_first, none_accepted, all_accepted = in_sglang(program, str(path))
    assert candidates == [0, 1, 3]
    assert at_first == {"1": 3, "31": 3, "32": 3, "64": 1, "128": 0, "300": 0}
    assert set(none_accepted[-20:]) == {0, 1}, "no drafts, and one step tried again"
    assert set(all_accepted[-20:]) == {3}


def test_the_budget_is_divided_by_the_number_of_corpora() -> None:
    """So that a server is given one: as many as the budget has tokens leave one token to each, and more none."""
    program = """
        import json
        from sglang.srt.speculative.cpp_ngram.external_corpus import SEPARATOR_TOKEN
        from sglang.srt.speculative.cpp_ngram.ngram_corpus import NgramCorpus
        made = NgramCorpus(draft_token_num=12, external_sam_budget=8)
        def add(name, *chunks):
            made.commit_external_corpus_load(name, made.load_external_corpus_named(name, list(chunks)))
        def drafted():
            made.synchronize()
            return made.batch_get(["r"], [[2, 3, 4]], [3])[0].tolist()
        add("a", [9, 3, 4, 50, 51], [SEPARATOR_TOKEN, 1, 2, 3, 4, 5, 6, 7, 8, 9])
        found = [drafted()]
        for other in range(8):
            add(f"x{other}", [99, 98, 97])
            found.append(drafted())
        print(json.dumps(found))
    """
    alone, *crowded = in_sglang(program)
    assert {4, 5, 50, 6} <= set(alone), "behind the last token, what was behind it and its forerunners in both"
    assert [sum(token != 0 for token in found) for found in crowded] == sorted(
        (sum(token != 0 for token in found) for found in crowded), reverse=True
    )
    assert crowded[-1][1:] == [0] * 11
