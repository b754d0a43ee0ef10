"""A draft falls behind a policy that learns, and keeps up with it when it is trained beside it; all services are real."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from serving_cluster import serving, wait_for
from whole_runs import Records

from benchmarks.draft_drift import DRAFT_STEPS, make, settings
from miles.client import MilesClient

STEPS = 9
LEARNT = STEPS - 2
"""Step from which the policy hardly moves any more."""


REWARDS = ("--custom-rm-path=benchmarks.draft_drift.share_of_threes", "--gateway-allowed-module=benchmarks.draft_drift")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The counting policy, its draft and its prompts."""
    made = tmp_path_factory.mktemp("counting")
    make(made)
    return made


@pytest.fixture(scope="module")
def client(folder: pathlib.Path) -> Iterator[MilesClient]:
    """A client of services for both runs."""
    with serving(folder, folder, *REWARDS) as found:
        yield found


def submitted(client: MilesClient, folder: pathlib.Path, mode: str) -> Mapping[str, Any]:
    config = settings(folder, mode, STEPS) | {"name": mode, "lr_decay_iters": LEARNT}
    config.pop("device")
    return client.submit(config)


def lengths(job: Mapping[str, Any]) -> list[float]:
    """Mean tokens per verification of each step."""
    return [line["rollout/spec_accept_length"] for line in Records(pathlib.Path(job["config"]["run_dir"])).metrics()]


def test_a_frozen_draft_falls_behind_and_one_trained_online_keeps_up(
    client: MilesClient, folder: pathlib.Path
) -> None:
    """Both runs train the same policy: what drafts do changes no response."""
    frozen = submitted(client, folder, "frozen")
    wait_for(client, frozen["id"], lambda job: job["state"] == "succeeded")
    online = submitted(client, folder, "online")
    # The run does not wait for its draft trainer, which may have no core left to it: so this one does, near the end.
    wait_for(client, online["id"], lambda job: job["policy_version"] >= LEARNT - 1)
    client.pause(online["id"])
    paused = wait_for(client, online["id"], lambda job: job["state"] == "paused")
    wait_for_draft(client, online["id"], paused["policy_version"])
    client.resume(online["id"])
    wait_for(client, online["id"], lambda job: job["state"] == "succeeded")

    rewards = [
        [line["rollout/raw_reward"] for line in Records(pathlib.Path(job["config"]["run_dir"])).metrics()]
        for job in (frozen, online)
    ]
    assert rewards[0] == rewards[1]
    assert rewards[0][-1] > 4 * rewards[0][0], "the policy has moved"
    before, after = lengths(frozen)[0], statistics.mean(lengths(frozen)[LEARNT:])
    assert 2 < before < 1 + DRAFT_STEPS
    assert after < 0.6 * before
    assert lengths(online)[0] == pytest.approx(before, rel=0.01)
    assert lengths(online)[-1] > 0.95 * before


def wait_for_draft(client: MilesClient, job_id: str, version: int) -> None:
    """Return once the engine drafts with this version or a later one."""

    def served(_: object) -> bool:
        engines = client.status(job_id)["speculation"]
        return any((engine["draft_version"] or 0) >= version for engine in engines)

    wait_for(client, job_id, served)
