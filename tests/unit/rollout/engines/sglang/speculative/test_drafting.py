from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from miles.services.rollout.engines.base import SpeculationState
from miles.services.rollout.engines.sglang import ServerUnstartable, SglangOptions
from miles.services.rollout.engines.sglang.server.replica import Replica
from miles.services.rollout.engines.sglang.speculative.drafting import ServerDrafts
from miles.types import SpeculativeStats

EAGLE = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": "d", "speculative_num_steps": 5}
NGRAM = {"speculative_algorithm": "NGRAM"}


async def never(replica: Replica) -> None:
    raise AssertionError(replica)


def drafting(tmp_path: pathlib.Path, flags: dict[str, Any], **changes: Any) -> ServerDrafts:
    given: dict[str, Any] = {"hf_checkpoint": "m", "server_flags": flags, "log_dir": tmp_path / "logs"}
    options = SglangOptions(**given | changes)
    return ServerDrafts(options, [Replica(options, 0, never, lambda: None)])


def test_steps_adapt_unless_the_job_says_otherwise(tmp_path: pathlib.Path) -> None:
    eagle = drafting(tmp_path, EAGLE)
    flags = eagle.flags()
    assert flags["speculative_adaptive"] is True
    path = pathlib.Path(flags["speculative_adaptive_config"])
    assert json.loads(path.read_text())["1"]["candidate_steps"] == [0, 1, 3, 5]
    assert path.is_relative_to(tmp_path)
    eagle.close()
    assert not path.exists()
    for fixed in ({**EAGLE, "speculative_adaptive": False}, NGRAM, {**EAGLE, "speculative_algorithm": "STANDALONE"}):
        assert "speculative_adaptive" not in drafting(tmp_path, fixed).flags()
    own = drafting(tmp_path, {**EAGLE, "speculative_adaptive_config": "mine.json"}).flags()
    assert own["speculative_adaptive"] is True
    assert "speculative_adaptive_config" not in own


def test_rejection_sampling_keeps_drafting(tmp_path: pathlib.Path) -> None:
    eagle = drafting(tmp_path, {**EAGLE, "speculative_use_rejection_sampling": True})
    tiers = json.loads(pathlib.Path(eagle.flags()["speculative_adaptive_config"]).read_text())
    assert all(0 not in tier["candidate_steps"] for start, tier in tiers.items() if start.isdigit())
    eagle.close()


def test_servers_are_told_before_they_start(tmp_path: pathlib.Path) -> None:
    ngram = drafting(tmp_path, NGRAM, earlier_responses=True)
    ngram.prepare()
    assert ngram._replicas[0].drafting["speculative_ngram_external_sam_budget"] == 8
    plain = drafting(tmp_path, {})
    plain.prepare()
    assert plain._replicas[0].drafting == {}


def test_a_cpu_that_would_verify_greedily_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ServerUnstartable, match="greedily"):
        drafting(tmp_path, NGRAM, device="cpu").prepare()
    with pytest.raises(ServerUnstartable, match="greedily"):
        drafting(tmp_path, {}, addresses=("h:1",)).start({**NGRAM, "device": "cpu"})
    drafting(tmp_path, {}, device="cpu").prepare()


def test_a_state_says_what_is_drafted_and_what_became_of_it(tmp_path: pathlib.Path) -> None:
    assert drafting(tmp_path, {}).state(None) is None
    assert drafting(tmp_path, NGRAM).state(None) == SpeculationState(None, 11)
    eagle = drafting(tmp_path, EAGLE)
    eagle.counts.add(4, 2, SpeculativeStats(1, 5, 1))
    state = eagle.state(2)
    assert state is not None
    assert (state.draft_version, state.num_steps, state.reason, state.speedup) == (2, 5, "", 0.0)
    assert [(c.policy_version, c.draft_version, c.verify_count) for c in state.counts] == [(4, 2, 1)]
