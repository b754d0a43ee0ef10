"""Judgements about machines that are broken in ways that this one is not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from miles.doctor import (
    folders,
    gpus,
    limits,
    low_precision,
    memory,
    packages,
    processor,
    proxies,
    redis_server,
    surroundings,
)
from miles.doctor.finding import Finding, Status
from miles.memory.amount import Part

GIB = 1 << 30
NEED = Part("need", 8 * GIB, "a formula")
H200: dict[str, Any] = {"name": "H200", "capability": [9, 0], "bytes": 139 * GIB}
TORCH: dict[str, Any] = {
    "version": "2.13.0",
    "cuda_build": "13.0",
    "cuda_works": True,
    "built_for": ["sm_80", "sm_90"],
    "gpus": [H200],
    "speed": {},
}
DISK = folders.Folder("--run-dir", "runs", "/data", True, True, "ext4", frozenset({"rw"}), 100 * GIB, 1000, None, True)
SERVER: dict[str, Any] = {
    "redis_version": "7.2.4",
    "used_memory": 1000,
    "maxmemory": 0,
    "maxmemory_policy": "noeviction",
    "aof_enabled": 1,
    "role": "master",
}


def worst(findings: list[Finding]) -> tuple[str, str]:
    """Status and text of the worst finding."""
    ranks = list(Status)
    finding = max(findings, key=lambda finding: ranks.index(finding.status))
    assert bool(finding.change) == (finding.status is not Status.OK)
    return finding.status, finding.found


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, "ok", "2 cores"),
        ({"usable": 1}, "warn", "1 cores of 2, by affinity or a cgroup's quota"),
        ({"speed": None}, "ok", "2 cores"),
        ({"wanted": ("bfloat16",)}, "warn", "this machine is slow in bfloat16: a matrix product takes 5 times"),
        ({"flags": frozenset({"amx_bf16"})}, "warn", "instructions for bfloat16: amx_bf16, but a product in bfloat16"),
        ({"flags": frozenset({"bf16"}), "speed": {"bfloat16_slowdown": 0.4, "float16_slowdown": 1}}, "ok", "2 cores"),
    ],
)
def test_processors(changes: dict[str, Any], status: str, text: str) -> None:
    speed = {"bfloat16_slowdown": 5.0, "float16_slowdown": 7.0}
    facts = dataclasses.replace(processor.Processor(2, 2, frozenset(), speed, ()), **changes)
    found = worst(processor.judge(facts))
    assert found[0] == status
    assert found[1].startswith(text)


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, "ok", "1 GPUs: H200; driver 580.1, PyTorch 2.13.0 for CUDA 13.0"),
        ({"visible": 0}, "fail", "no GPU for this process"),
        ({"visible": 0, "wanted": False}, "ok", "no GPU for this process; runs use the processor"),
        ({"torch": None}, "ok", "1 GPUs; PyTorch is not installed"),
        ({"torch": TORCH | {"cuda_build": None}}, "fail", "1 GPUs, but a CPU build"),
        ({"torch": TORCH | {"cuda_works": False}}, "fail", "1 GPUs that PyTorch cannot use: driver 580.1"),
        (
            {"torch": TORCH | {"built_for": ["sm_80"]}},
            "fail",
            "GPU 0 (H200) has compute capability 9.0, PyTorch is built",
        ),
        (
            {"torch": TORCH | {"gpus": [H200 | {"capability": [7, 5]}], "built_for": ["sm_75"]}},
            "warn",
            "GPU 0 (H200, 7.5)",
        ),
        ({"trainer_bytes": 140 * GIB}, "fail", "each trainer rank needs about 140.0 GiB"),
    ],
)
def test_gpus(changes: dict[str, Any], status: str, text: str) -> None:
    found = worst(gpus.judge(dataclasses.replace(gpus.Gpus(1, "580.1", TORCH, True), **changes)))
    assert found[0] == status
    assert found[1].startswith(text)


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        (memory.Memory(32 * GIB, 30 * GIB, None, NEED), "ok"),
        (memory.Memory(32 * GIB, 4 * GIB, None, NEED), "warn"),
        (memory.Memory(12 * GIB, 11 * GIB, None, NEED), "warn"),
        (memory.Memory(32 * GIB, 30 * GIB, 4 * GIB, NEED), "fail"),
        (memory.Memory(32 * GIB, 30 * GIB, 1 * GIB, None), "warn"),
        (memory.Memory(32 * GIB, 30 * GIB, None, None), "ok"),
    ],
)
def test_memory(facts: memory.Memory, status: str) -> None:
    assert worst(memory.judge(facts))[0] == status


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        (memory.Shared("/dev/shm", 64 * GIB, 64 * GIB, True, NEED, False), "ok"),
        (memory.Shared("/dev/shm", 64 << 20, 64 << 20, True, NEED, False), "warn"),
        (memory.Shared("/dev/shm", 64 << 20, 64 << 20, True, NEED, True), "fail"),
        (memory.Shared("/dev/shm", 64 << 20, 64 << 20, True, None, False), "warn"),
        (memory.Shared("/dev/shm", 0, 0, False, None, False), "warn"),
    ],
)
def test_shared_memory(facts: memory.Shared, status: str) -> None:
    assert worst(memory.judge_shared(facts))[0] == status


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, "ok", "100.0 GiB free on ext4"),
        ({"is_folder": False}, "fail", "/data is a file"),
        ({"writable": False}, "fail", "may not write to /data"),
        ({"options": frozenset({"ro"})}, "fail", "mounted read-only"),
        ({"free_inodes": 0}, "fail", "no inode left"),
        ({"need": Part("disk", 200 * GIB, "a formula")}, "fail", "the run writes about 200.0 GiB (a formula)"),
        ({"free": 1000}, "warn", "1000 bytes free"),
        ({"kind": "nfs4"}, "warn", "a network file system"),
        ({"kind": "tmpfs"}, "warn", "which is memory"),
        ({"kind": "overlay"}, "warn", "gone with the container"),
        ({"kind": "overlay", "lasting": False}, "ok", "free on overlay"),
        ({"flag": "TMPDIR", "options": frozenset({"noexec"})}, "warn", "mounted noexec"),
    ],
)
def test_folders(changes: dict[str, Any], status: str, text: str) -> None:
    found = worst(folders.judge([dataclasses.replace(DISK, **changes)]))
    assert found[0] == status
    assert text in found[1]


@pytest.mark.parametrize(
    ("facts", "status", "text"),
    [
        (limits.Limits((65536, -1), (-1, -1), (-1, -1), (-1, -1)), "ok", "65536 open files"),
        (limits.Limits((-1, -1), (-1, -1), (-1, -1), (-1, -1)), "ok", "any number of open files"),
        (limits.Limits((1024, 524288), (-1, -1), (-1, -1), (-1, -1)), "warn", "1024 open files"),
        (limits.Limits((64, 64), (-1, -1), (-1, -1), (-1, -1)), "fail", "64 open files"),
        (limits.Limits((65536, -1), (100, 100), (-1, -1), (-1, -1)), "warn", "100 processes"),
        (limits.Limits((65536, -1), (-1, -1), (GIB, GIB), (-1, -1)), "warn", "address space is limited to 1.0 GiB"),
        (limits.Limits((65536, -1), (-1, -1), (-1, -1), (GIB, GIB)), "warn", "files are limited to 1.0 GiB"),
    ],
)
def test_limits(facts: limits.Limits, status: str, text: str) -> None:
    found = worst(limits.judge(facts))
    assert found[0] == status
    assert found[1].startswith(text)


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        (proxies.Proxies({}, "", [("services", "10.0.0.1")], False), "ok"),
        (proxies.Proxies({"http_proxy": "http://p:3"}, "", [("services", "127.0.0.1"), ("s", "::1")], False), "ok"),
        (proxies.Proxies({"http_proxy": "http://p:3"}, "", [("services", "10.0.0.1")], False), "warn"),
        (proxies.Proxies({"http_proxy": "http://p:3"}, "10.0.0.1,x", [("services", "10.0.0.1")], False), "ok"),
        (proxies.Proxies({"all_proxy": "socks5://p:3"}, "", [], False), "fail"),
        (proxies.Proxies({"all_proxy": "socks5://p:3"}, "", [], True), "ok"),
    ],
)
def test_proxies(facts: proxies.Proxies, status: str) -> None:
    assert worst(proxies.judge(facts))[0] == status


def test_a_proxys_password_is_not_shown() -> None:
    facts = proxies.Proxies({"http_proxy": "http://me:hunter2@p:3"}, "", [("services", "10.0.0.1")], False)
    assert "hunter2" not in str(proxies.judge(facts))


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, "ok", "redis://h: version 7.2.4"),
        ({"redis_version": "5.0.7"}, "fail", "redis://h: it has version 5.0.7"),
        ({"maxmemory_policy": "allkeys-lru"}, "warn", "redis://h: its maxmemory-policy is allkeys-lru"),
        ({"maxmemory_policy": "allkeys-lru", "maxmemory": 9000}, "fail", "redis://h: its maxmemory-policy is"),
        ({"maxmemory": 1100}, "warn", "redis://h: 1000 bytes of maxmemory 1.1 KiB are used"),
        ({"aof_enabled": 0}, "warn", "redis://h: its append-only file is off"),
        ({"role": "slave"}, "fail", "redis://h: it is a replica"),
        ({"cluster_enabled": 1}, "fail", "redis://h: it is a cluster"),
    ],
)
def test_redis(changes: dict[str, Any], status: str, text: str) -> None:
    found = worst(redis_server.judge(redis_server.RedisFacts("redis://h", info=SERVER | changes)))
    assert found[0] == status
    assert found[1].startswith(text)


def test_packages_of_other_versions_are_named_with_the_command_that_mends_them() -> None:
    pinned = {"torch": "2.13.0", "sglang": "0.5.21"}
    facts = packages.Packages(pinned, {"torch": "2.13.0+cpu", "sglang": None}, {})
    assert packages.judge(facts)[0].found == "torch 2.13.0+cpu; not installed: sglang"
    (found,) = packages.judge(dataclasses.replace(facts, installed={"torch": "2.9.1"}))
    assert (found.status, found.found) == ("warn", "torch 2.9.1 is installed; 2.13.0 was tested with the others")
    assert found.change.endswith("-m pip install torch==2.13.0")
    (found,) = packages.judge(dataclasses.replace(facts, needed={"sglang": "rollout-sglang"}))
    assert (found.status, found.change) == ("fail", "pip install 'miles[rollout-sglang]'")
    other = dataclasses.replace(facts, engine_python="/sgl/python", engine_installed=None)
    assert packages.judge(other)[0].found == "/sgl/python does not run as a Python"
    other = dataclasses.replace(other, engine_installed={"sglang": "0.5.10", "torch": "2.13.0+cu130"})
    assert packages.judge(other)[0].change == "/sgl/python -m pip install sglang==0.5.21"
    (found,) = packages.judge(packages.Packages({}, {}, {}))
    assert (found.status, found.change) == ("warn", "pip install --editable . in the checkout")


def test_a_clock_that_was_reset_and_a_locale_of_few_letters_are_noticed() -> None:
    good = surroundings.Surroundings(1.8e9, 1.7e9, "utf-8", "utf-8", (3, 11))
    assert worst(surroundings.judge(good))[0] == "ok"
    assert worst(surroundings.judge(dataclasses.replace(good, now=0.0)))[1].startswith("the clock says 1970-01-01")
    assert worst(surroundings.judge(dataclasses.replace(good, encoding="iso8859-1")))[0] == "warn"
    assert worst(surroundings.judge(dataclasses.replace(good, python=(3, 9))))[0] == "fail"


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, "ok", "trainer in fp8_block and engines in fp8_block; GPUs of compute capability 9.0 have kernels"),
        ({"trained": None, "served": None}, "ok", "no kernels for formats of few bits are needed"),
        ({"capability": None}, "ok", "trainer in fp8_block and engines in fp8_block"),
        ({"installed": frozenset({"sgl_kernel"})}, "warn", "TransformerEngine is not installed: fp8_block is emulated"),
        ({"installed": frozenset({"sgl_kernel"}), "insists": True}, "fail", "TransformerEngine is not installed, as"),
        (
            {"trained": "mxfp8", "served": None},
            "warn",
            "TransformerEngine has kernels for mxfp8 from compute capability 10.0 on, and a GPU has 9.0: mxfp8 is",
        ),
        (
            {"trained": None, "capability": (8, 0)},
            "fail",
            "SGLang computes in fp8_block from compute capability 8.9 on, and a GPU has 8.0",
        ),
        ({"trained": None, "served": "int4", "capability": (8, 0)}, "ok", "engines in int4; GPUs of"),
        ({"installed": frozenset({"transformer_engine"})}, "fail", "SGLang's kernels (sgl_kernel) are not installed"),
        ({"installed": frozenset({"transformer_engine"}), "own_interpreter": False}, "ok", "trainer in fp8_block"),
    ],
)
def test_low_precision(changes: dict[str, Any], status: str, text: str) -> None:
    both = frozenset({"transformer_engine", "sgl_kernel"})
    facts = low_precision.LowPrecision(trained="fp8_block", served="fp8_block", capability=(9, 0), installed=both)
    found = worst(low_precision.judge(dataclasses.replace(facts, **changes)))
    assert found[0] == status
    assert found[1].startswith(text)
