"""A whole job with mutual TLS between all services."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from authority import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving_cluster import config, serving, wait_for

from miles.client import MilesClient
from miles.rpc.tls import CA, CERT, KEY, MUTUAL, TlsFiles


@pytest.fixture
def authority(tmp_path: pathlib.Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def files(authority: Authority) -> dict[str, str]:
    """Variables with a certificate of this machine."""
    return {**authority.issue("services"), CA: authority.path, MUTUAL: "1"}


@pytest.fixture
def client(tiny_dense: pathlib.Path, tmp_path: pathlib.Path, files: dict[str, str]) -> Iterator[MilesClient]:
    flags = ("--tls-cert", files[CERT], "--tls-key", files[KEY], "--tls-ca", files[CA], "--tls-mutual")
    with serving(tmp_path, tiny_dense, *flags) as client:
        yield client


def answers(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    """Whether a server's health can be asked for."""
    channel: Any = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.engine
def test_a_job_runs_with_every_connection_encrypted_and_both_ends_verified(
    client: MilesClient, tiny_dense: pathlib.Path, tmp_path: pathlib.Path, files: dict[str, str], authority: Authority
) -> None:
    job_id = client.submit(config(tiny_dense, name="encrypted"))["id"]
    job = wait_for(client, job_id, lambda job: job["state"] == "succeeded")
    assert job["policy_version"] == 3
    controller = (tmp_path / "runs" / "serve" / "controller.address").read_text()
    servers = {worker["kind"]: worker["address"] for worker in client.workers()} | {"controller": controller}
    assert set(servers) == {"controller", "rollout", "trainer", "draft_trainer", "reward", "weightsync"}
    trusted = TlsFiles.from_environment(files)
    (tmp_path / "elsewhere").mkdir()
    stranger = Authority(tmp_path / "elsewhere", "theirs").issue("stranger")
    theirs = TlsFiles.from_environment({**stranger, CA: authority.path, MUTUAL: "1"})
    assert trusted is not None
    assert theirs is not None
    for kind, address in servers.items():
        assert answers(address, trusted.channel_credentials()), kind
        assert not answers(address, None), f"{kind} is open in the clear"
        nameless = grpc.ssl_channel_credentials(pathlib.Path(authority.path).read_bytes())
        assert not answers(address, nameless), f"{kind} serves clients without a certificate"
        assert not answers(address, theirs.channel_credentials()), f"{kind} trusts certificates of others"
