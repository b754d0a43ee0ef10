"""Who may do what."""

from __future__ import annotations

import http.client
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
from gateway_stack import REPOSITORY, Stack, problem

from miles.gateway.app import create_app
from miles.gateway.keys import KeyFile, Scope
from miles.gateway.options import GatewayOptions

OPEN = {"/healthz", "/readyz"}


def as_(stack: Stack, name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {stack.keys[name]}"}


@pytest.fixture
def keyed(stack: Stack) -> Any:
    """A client of the gateway with keys."""
    with httpx.Client(base_url=stack.keyed.address, timeout=120) as client:
        yield client


def test_every_operation_needs_a_key(keyed: httpx.Client) -> None:
    document = keyed.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            answer = keyed.request(method, path.replace("{step}", "1").replace("{job_id}", "a").replace("{name}", "b"))
            if path in OPEN:
                assert answer.status_code == 200
            else:
                assert problem(answer, "missing-key")["status"] == 401
                assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["x", "mk_00000000_" + "a" * 43, "mk_"])
def test_a_wrong_key_is_refused(keyed: httpx.Client, key: str) -> None:
    answer = keyed.get("/v1/jobs", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 401
    assert "miles keys" in answer.json()["detail"]


def test_scopes_are_kept_apart(stack: Stack, keyed: httpx.Client) -> None:
    config = stack.config(name="scoped")
    denied = keyed.post("/v1/jobs", json=config, headers=as_(stack, "reader"))
    assert "--scope submit" in problem(denied, "missing-scope")["detail"]
    made = keyed.post("/v1/jobs", json=config, headers=as_(stack, "alice"))
    assert made.status_code == 201
    assert made.json()["submitted_by"] == "alice"
    path = f"/v1/jobs/{made.json()['id']}"
    assert keyed.get(path, headers=as_(stack, "reader")).status_code == 200
    for name in ("reader", "bob"):
        for action in ("pause", "resume", "stop", "cancel", "checkpoint", "versions/check"):
            assert problem(keyed.post(f"{path}/{action}", headers=as_(stack, name)), "missing-scope")["status"] == 403
    assert keyed.post(f"{path}/stop", headers=as_(stack, "alice")).status_code == 202
    assert keyed.post(f"{path}/cancel", headers=as_(stack, "boss")).status_code in (202, 409)


def test_idempotency_keys_of_two_callers_do_not_meet(stack: Stack, keyed: httpx.Client) -> None:
    ids = set()
    for name in ("alice", "bob"):
        headers = as_(stack, name) | {"Idempotency-Key": "1"}
        answer = keyed.post("/v1/jobs", json=stack.config(name=f"of-{name}"), headers=headers)
        assert answer.status_code == 201, answer.text
        ids.add(answer.json()["id"])
        keyed.post(f"/v1/jobs/{answer.json()['id']}/cancel", headers=as_(stack, "boss"))
    assert len(ids) == 2


def test_a_revoked_key_no_longer_counts(stack: Stack, keyed: httpx.Client) -> None:
    keys = KeyFile(pathlib.Path(stack.keyed.command[stack.keyed.command.index("--keys-file") + 1]))
    _, text = keys.create("short-lived", Scope.READ)
    headers = {"Authorization": f"Bearer {text}"}
    statuses = [keyed.get("/v1/workers", headers=headers).status_code]
    time.sleep(1.1)
    statuses.append(keyed.get("/v1/workers", headers=headers).status_code)
    keys.revoke("short-lived")
    time.sleep(1.1)
    statuses.append(keyed.get("/v1/workers", headers=headers).status_code)
    assert statuses[1:] == [200, 401]


def test_a_body_that_is_too_large_is_refused(http: httpx.Client) -> None:
    announced = http.post("/v1/jobs", content=b"x" * (2 << 20), headers={"Content-Type": "application/json"})
    assert "1048576 bytes" in problem(announced, "body-too-large")["detail"]

    def pieces() -> Any:
        for _ in range(40):
            yield b" " * 65536

    unannounced = http.post("/v1/jobs", content=pieces(), headers={"Content-Type": "application/json"})
    assert problem(unannounced, "body-too-large")["status"] == 413


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "99999999999999999999"])
def test_a_length_that_is_none_is_refused(stack: Stack, length: str) -> None:
    host, port = stack.local.address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.putrequest("POST", "/v1/jobs")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status in (400, 413)
    connection.close()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "127.0.0.1.evil.example:80"},
    ],
)
def test_without_keys_no_other_site_is_served(http: httpx.Client, headers: dict[str, str]) -> None:
    assert problem(http.get("/v1/jobs", headers=headers), "not-local")["status"] == 403
    assert problem(http.post("/v1/jobs/a/cancel", headers=headers), "not-local")


def test_the_page_itself_is_served(stack: Stack, http: httpx.Client) -> None:
    host = stack.local.address.removeprefix("http://")
    assert (
        http.get("/v1/jobs", headers={"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}).status_code == 200
    )
    localhost = host.replace("127.0.0.1", "localhost")
    assert http.get("/v1/jobs", headers={"Host": localhost}).status_code == 200


def test_answers_have_security_headers(http: httpx.Client) -> None:
    for path in ("/v1/jobs", "/v1/jobs/none", "/healthz", "/nothing"):
        headers = http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "server" not in headers
    assert http.get("/v1/jobs").headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in http.get("/v1/jobs", headers={"Origin": "http://127.0.0.1"}).headers


async def test_what_fails_in_the_gateway_is_told_counted_and_careful() -> None:
    app = create_app(GatewayOptions(controller="127.0.0.1:1"))

    @app.get("/fails")
    async def fail() -> None:
        raise ValueError("geheim")

    transport = httpx.ASGITransport(app, client=("127.0.0.1", 5), raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as c,
    ):
        answer = await c.get("/fails")
        assert "geheim" not in str(problem(answer, "internal"))
        assert answer.headers["x-content-type-options"] == "nosniff"
        counted = (await c.get("/metrics")).text
    assert 'miles_gateway_requests_total{method="GET",route="/fails",status="500"} 1.0' in counted
    assert "miles_controller_up 0.0" in counted


async def test_requests_beyond_the_rate_are_told_when_to_come_back(stack: Stack) -> None:
    options = GatewayOptions(controller=stack.controller.address, requests_per_s=0.5, burst=3)
    app = create_app(options)
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 5))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as c,
    ):
        answers = [await c.get("/v1/workers") for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert int(problem(answers[3], "too-many-requests") and answers[3].headers["retry-after"]) >= 1
        assert (await c.get("/healthz")).status_code == 200


async def test_guessing_keys_is_slowed_down(stack: Stack, tmp_path: pathlib.Path) -> None:
    app = create_app(GatewayOptions(controller=stack.controller.address, keys_file=tmp_path / "none.json"))
    transport = httpx.ASGITransport(app, client=("10.0.0.9", 5))
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://gw") as c:
        wrong = {"Authorization": "Bearer mk_00000000_" + "a" * 43}
        statuses = [(await c.get("/v1/workers", headers=wrong)).status_code for _ in range(25)]
    assert statuses == [401] * 20 + [429] * 5


async def test_without_keys_other_machines_are_not_served(stack: Stack) -> None:
    app = create_app(GatewayOptions(controller=stack.controller.address))
    transport = httpx.ASGITransport(app, client=("10.0.0.9", 5))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as c,
    ):
        problem(await c.get("/v1/jobs"), "not-local")


def test_a_gateway_without_keys_does_not_listen_for_other_machines() -> None:
    command = [sys.executable, "-m", "miles.gateway", "--controller", "127.0.0.1:1", "--listen", "0.0.0.0:0"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=180, env=dict(os.environ))
    assert ran.returncode == 2
    assert "miles keys create" in ran.stderr


def test_no_key_is_in_any_log(stack: Stack, keyed: httpx.Client) -> None:
    keyed.get("/v1/jobs?api_key=geheim", headers=as_(stack, "reader"))
    keyed.post("/v1/jobs/none/cancel", headers=as_(stack, "alice"))
    keyed.post("/v1/jobs", json={"train_env_vars": {"WANDB_API_KEY": "geheim"}}, headers=as_(stack, "alice"))
    text = stack.keyed.log.read_text() + stack.controller.log.read_text()
    assert "POST /v1/jobs/none/cancel 404" in text
    assert "by alice" in text
    assert "geheim" not in text
    assert not any(key.split("_", 2)[2] in text for key in stack.keys.values())


def test_the_openapi_document_is_complete(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation["operationId"], where
            assert operation["description"], where
            assert operation["tags"], where
            good = [status for status in operation["responses"] if status < "300"]
            assert good, where
            for status, response in operation["responses"].items():
                expected = {"application/problem+json"} if status >= "400" else set(response.get("content", {}))
                assert set(response.get("content", {})) == expected, (where, status)
            for parameter in operation.get("parameters", []):
                assert (
                    parameter.get("description")
                    or parameter["schema"].get("description")
                    or parameter["name"]
                    in (
                        "limit",
                        "step",
                        "min_reward",
                        "max_reward",
                        "name",
                    )
                ), (where, parameter["name"])
    text = json.dumps(document)
    assert "HTTPValidationError" not in text
    assert document["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
    example = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert example["lr"] == 1e-6
