"""Jobs over REST: submitted once, listed in pages, acted on, kept over restarts."""

from __future__ import annotations

import concurrent.futures
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from gateway_stack import Stack, problem, wait_for_state

Submit = Callable[..., dict[str, Any]]


def test_a_submitted_job_is_there(submit: Submit, http: httpx.Client, stack: Stack) -> None:
    made = submit(name="there", lr=2e-6)
    found = http.get(f"/v1/jobs/{made['id']}").json()
    assert found["config"]["lr"] == 2e-6
    assert found["config"]["hf_checkpoint"] == str(stack.root / "tiny" / "model")
    assert pathlib.Path(found["config"]["run_dir"]).parent == stack.root / "runs"
    assert found["submitted_by"] == "local"
    assert (found["name"], found["num_rollout"], found["policy_version"]) == ("there", 2, 0)
    listed = http.get("/v1/jobs").json()["jobs"]
    assert made["id"] in [job["id"] for job in listed]
    assert "config" not in listed[0]


def test_concurrent_submits_with_one_key_make_one_job(http: httpx.Client, stack: Stack) -> None:
    def send(_: int) -> httpx.Response:
        return httpx.post(
            f"{stack.local.address}/v1/jobs",
            json=stack.config(name="once"),
            headers={"Idempotency-Key": "the-same"},
            timeout=120,
        )

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(send, range(12)))
    assert sorted(answer.status_code for answer in answers) == [200] * 11 + [201]
    (job_id,) = {answer.json()["id"] for answer in answers}
    assert [job["name"] for job in http.get("/v1/jobs").json()["jobs"]].count("once") == 1
    again = httpx.post(
        f"{stack.local.address}/v1/jobs", json=stack.config(name="other"), headers={"Idempotency-Key": "the-same"}
    )
    assert again.status_code == 422
    assert job_id in problem(again, "key-reused")["detail"]
    http.post(f"/v1/jobs/{job_id}/cancel")
    ended = send(0)
    assert (ended.status_code, ended.json()["state"]) == (200, "cancelled")


def test_every_fault_of_a_configuration_is_listed(http: httpx.Client, stack: Stack) -> None:
    before = len(http.get("/v1/jobs").json()["jobs"])
    body = stack.config(
        lr="fast",  # 1: type
        rollout_batch_size=-1,  # 2: limit
        rm_typ="math",  # 3: no such setting
        advantage_estimator="gropo",  # 4: choice
        prompt_data="/etc/passwd",  # 5: outside the roots
        custom_rm_path="os.system",  # 6: module
        redis_url="redis://elsewhere",  # 7: not a job's
        sglang_port=3,  # 8: flag of the engine
        chat_template_path="none.jinja",  # 9: no such file
        rollout_top_p=1.5,  # 10: limit
        name="a/b",  # 11: no folder name
    )
    answer = http.post("/v1/jobs", json=body)
    assert answer.status_code == 422
    faults = {fault["field"]: fault for fault in problem(answer, "invalid-config")["faults"]}
    wrong = {"lr", "rollout_batch_size", "rm_typ", "advantage_estimator", "prompt_data", "custom_rm_path", "redis_url"}
    assert wrong | {"sglang_port", "chat_template_path", "rollout_top_p", "name"} <= set(faults)
    assert faults["rm_typ"]["remedy"] == "did you mean rm_type?"
    assert str(stack.root) in faults["prompt_data"]["remedy"]
    assert all(fault["problem"] and fault["remedy"] for fault in faults.values())
    assert len(http.get("/v1/jobs").json()["jobs"]) == before


def test_a_dry_run_checks_and_stores_nothing(http: httpx.Client, stack: Stack) -> None:
    before = len(http.get("/v1/jobs").json()["jobs"])
    assert http.post("/v1/jobs?dry_run=true", json=stack.config()).status_code == 204
    missing = http.post("/v1/jobs?dry_run=true", json=stack.config(hf_checkpoint="nowhere"))
    assert [fault["field"] for fault in problem(missing, "invalid-config")["faults"]] == ["hf_checkpoint"]
    assert len(http.get("/v1/jobs").json()["jobs"]) == before


def test_pages_are_not_shifted_by_new_jobs(submit: Submit, http: httpx.Client) -> None:
    ids = [submit(name=f"page{i}")["id"] for i in range(5)]
    first = http.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["jobs"]] == ids[:2:-1]
    submit(name="newer")
    second = http.get("/v1/jobs", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [job["id"] for job in second["jobs"]] == [ids[2], ids[1]]
    everything, cursor = [], ""
    while cursor is not None:
        page = http.get("/v1/jobs", params={"limit": 3, "cursor": cursor}).json()
        everything += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
    assert len(everything) == len(set(everything))
    assert set(ids) <= set(everything)
    problem(http.get("/v1/jobs", params={"cursor": "unknown"}), "unknown-cursor")


def test_jobs_are_filtered_by_state(submit: Submit, http: httpx.Client, waiting_job: dict[str, Any]) -> None:
    cancelled = submit(name="gone")["id"]
    http.post(f"/v1/jobs/{cancelled}/cancel")
    listed = http.get("/v1/jobs", params={"state": ["cancelled", "failed"], "limit": 500}).json()["jobs"]
    assert cancelled in [job["id"] for job in listed]
    assert waiting_job["id"] not in [job["id"] for job in listed]
    assert http.get("/v1/jobs", params={"state": "nonsense"}).status_code == 422


def test_a_waiting_job_leaves_the_queue_at_once(http: httpx.Client, waiting_job: dict[str, Any]) -> None:
    path = f"/v1/jobs/{waiting_job['id']}"
    assert problem(http.post(f"{path}/pause"), "not-possible-now")["status"] == 409
    assert problem(http.post(f"{path}/checkpoint"), "not-possible-now")["detail"]
    assert http.post(f"{path}/stop").json()["state"] == "stopped"
    assert http.get(path).json()["state"] == "stopped"
    resumed = http.post(f"{path}/resume")
    assert (resumed.status_code, resumed.json()["state"]) == (202, "queued")
    assert http.post(f"{path}/cancel").json()["state"] == "cancelled"
    assert http.post(f"{path}/cancel").status_code == 202
    assert "submit it as a new job" in problem(http.post(f"{path}/resume"), "not-possible-now")["detail"]
    assert http.get(path).json()["ended_at"]


def test_an_action_is_carried_out_once_for_each_key(http: httpx.Client, waiting_job: dict[str, Any]) -> None:
    path = f"/v1/jobs/{waiting_job['id']}"

    def act(action: str, key: str) -> httpx.Response:
        return http.post(f"{path}/{action}", headers={"Idempotency-Key": key})

    assert act("stop", "first").json()["state"] == "stopped"
    assert act("resume", "second").json()["state"] == "queued"
    again = act("stop", "first")  # sent once more because its answer was lost
    assert (again.status_code, again.json()["state"]) == (202, "queued")
    assert "stop of job" in problem(act("cancel", "first"), "key-reused")["detail"]
    assert http.get(path).json()["state"] == "queued"
    problem(act("pause", "refused"), "not-possible-now")
    assert act("cancel", "refused").json()["state"] == "cancelled"  # what was refused has used no key up


def test_a_job_that_has_begun_ends_when_it_is_cancelled(submit: Submit, http: httpx.Client) -> None:
    for job in http.get("/v1/jobs", params={"limit": 500}).json()["jobs"]:
        http.post(f"/v1/jobs/{job['id']}/cancel")
    job_id = submit(name="begun")["id"]
    state = wait_for_state(http, job_id, "starting", "queued")["state"]
    assert http.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
    ended = wait_for_state(http, job_id, "cancelled")
    assert ended["error"] is None, state


def test_two_jobs_never_share_a_run_folder(submit: Submit, http: httpx.Client, stack: Stack) -> None:
    submit(name="first", run_dir="runs/shared")
    answer = http.post("/v1/jobs", json=stack.config(name="second", run_dir="runs/../runs/shared"))
    assert "runs/shared" in problem(answer, "conflict")["detail"]


@pytest.mark.parametrize(
    "what", ["", "/events", "/metrics", "/timeline", "/samples", "/checkpoints", "/versions", "/workers", "/logs"]
)
def test_an_unknown_job_is_not_found(http: httpx.Client, what: str) -> None:
    assert "nothing-here" in problem(http.get(f"/v1/jobs/nothing-here{what}"), "unknown-job")["detail"]


def test_jobs_survive_controller_and_gateway(http: httpx.Client, stack: Stack, waiting_job: dict[str, Any]) -> None:
    cancelled = http.post("/v1/jobs", json=stack.config(name="cancelled")).json()["id"]
    http.post(f"/v1/jobs/{cancelled}/cancel")
    before = {job["id"]: job["state"] for job in http.get("/v1/jobs?limit=500").json()["jobs"]}
    stack.controller.stop(signal.SIGKILL)
    away = http.get("/v1/jobs")
    assert problem(away, "controller-away")["status"] == 503
    assert away.headers["retry-after"]
    assert http.get("/healthz").status_code == 200
    assert problem(http.get("/readyz"), "controller-away")
    stack.local.stop(signal.SIGKILL)
    stack.controller.start()
    stack.local.start()
    with httpx.Client(base_url=stack.local.address, timeout=120) as again:
        after = {job["id"]: job["state"] for job in again.get("/v1/jobs?limit=500").json()["jobs"]}
        assert set(after) == set(before)
        assert after[cancelled] == "cancelled"
        assert again.get("/readyz").status_code == 200
        again.post(f"/v1/jobs/{waiting_job['id']}/cancel")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "malformed-body"),
        (b"[]", "malformed-body"),
        (b'"text"', "malformed-body"),
        (b"", "malformed-body"),
        (b'{"lr": NaN}', "malformed-body"),
        (b'{"name": "\\ud800"}', "malformed-body"),
        (b"\xff\xfe", "malformed-body"),
        (b"[" * 100_000, "malformed-body"),
        (b"{}", "invalid-config"),
        (b'{"lr": 1e400}', "invalid-config"),
        (b'{"name": "a\\u0000"}', "invalid-config"),
    ],
)
def test_a_body_that_is_no_configuration_is_refused(http: httpx.Client, body: bytes, kind: str) -> None:
    answer = http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    problem(answer, kind)


def test_only_json_is_accepted(http: httpx.Client) -> None:
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = http.post("/v1/jobs", content=b"{}", headers={"Content-Type": media_type})
        assert problem(answer, "unsupported-media-type")["status"] == 415


def test_a_method_that_does_not_go_names_those_that_do(http: httpx.Client) -> None:
    assert http.delete("/v1/jobs").headers["allow"] == "GET, POST"
    assert "POST" in problem(http.put("/v1/jobs"), "method-not-allowed")["detail"]
    problem(http.get("/v1/nothing"), "not-found")
    for path in ("/", "/static/js/main.js"):
        assert problem(http.post(path), "method-not-allowed")["status"] == 405
        assert http.post(path).headers["allow"] == "GET, HEAD"
    assert http.get("/problems/unknown-job").text.startswith("There is no such job")
