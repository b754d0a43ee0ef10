"""Schemathesis against the OpenAPI document with all checks on."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import httpx
import pytest
from gateway_stack import Stack, fill_run_folder, service, write_task

MAX_EXAMPLES = 8

CONFIG = """
generation.max-examples = {examples}
generation.database = "none"
request-timeout = 20

# What a configuration's settings may be together, and whether its files exist, is beyond a JSON schema.
[[operations]]
include-operation-id = "submitJob"
checks.positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "422"]
phases.coverage.enabled = {every_setting}

# What a key was used for before, too.
[[operations]]
include-path-regex = '/(pause|resume|stop|cancel|checkpoint)$'
parameters = {{ "path.job_id" = "{job_id}" }}
checks.positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "422"]

# Operations that have no other name in their path get a job that is there.
[[operations]]
include-path-regex = '^/v1/jobs/.job_id.(/[a-z]+)?$'
parameters = {{ "path.job_id" = "{job_id}" }}
"""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("every_setting", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_request_breaks_the_contract(stack: Stack, tmp_path: pathlib.Path, every_setting: bool) -> None:
    """No server error, no answer that the document does not describe, nothing invalid accepted, no valid refused.

    Of the hundreds of settings of a job, each has all its kinds of values in the slow test alone; else some are drawn.
    """
    example_files(stack)
    gateway = service(
        tmp_path, "fuzzed", *stack.keyed.command[2:-2], "--stream-seconds", "0.2", "--rate-limit", "100000"
    )
    gateway.start()
    headers = {"Authorization": f"Bearer {stack.keys['boss']}"}
    with httpx.Client(base_url=gateway.address, headers=headers, timeout=120) as client:
        made: dict[str, Any] = client.post("/v1/jobs", json=stack.config(name="fuzzed")).json()
        fill_run_folder(pathlib.Path(made["config"]["run_dir"]))
        client.post(f"/v1/jobs/{made['id']}/stop")
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG.format(examples=MAX_EXAMPLES, job_id=made["id"], every_setting=str(every_setting).lower()))
    command = [
        *(str(pathlib.Path(sys.executable).with_name("schemathesis")), "--config-file", str(config)),
        *("run", f"{gateway.address}/openapi.json", "--checks", "all", "--continue-on-failure", "--no-color"),
        *("-H", f"Authorization: {headers['Authorization']}", "--seed", "1", "--suppress-health-check", "all"),
    ]
    try:
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1700)
    finally:
        gateway.stop()
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-2000:]
    assert "Tested: 25" in ran.stdout


def example_files(stack: Stack) -> None:
    """What the document's example names, so that it can be submitted."""
    write_task(stack.root / "example")
    for name, target in (("models", "model"), ("data", "train.jsonl")):
        folder = stack.root / name
        folder.mkdir(exist_ok=True)
        link = folder / ("smollm2" if name == "models" else "train.jsonl")
        if not link.exists():
            link.symlink_to(stack.root / "example" / target)
