"""A run on several hosts: network namespaces with addresses of their own, whose links can be cut."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hosts import Hosts, hosts
from whole_runs import REPOSITORY, Run, recipe, runs_of_test

from miles.rpc import ExitCode

STEPS = 6
NODE, ROLLOUT = "start the trainer's node 1 of 2:", "start rollout-0, on any host:"
PROGRAMS = {"miles": [sys.executable, "-m", "miles.cli"], "python": [sys.executable]}
SHORT = {"num_rollout": STEPS, "save_interval": 2, "rollout_batch_size": 4, "n_samples_per_prompt": 8}
END_S = 120.0


@dataclasses.dataclass
class Cluster:
    """Three hosts: the launcher and node 0 of the trainer, its node 1, and the rollout."""

    hosts: Hosts
    run: Run
    folder: pathlib.Path
    processes: list[subprocess.Popen[bytes]] = dataclasses.field(default_factory=list)

    def start(self, host: int, what: str) -> subprocess.Popen[bytes]:
        """Start on a host what the launcher told people to start there."""
        self.run.wait_for_text(what)
        words = shlex.split(self.run.log.read_text().partition(what)[2].strip().partition("\n")[0])
        command = self.hosts.on(host, [*PROGRAMS[words[0]], *words[1:]])
        with self.log(host).open("ab") as log:
            self.processes.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log))
        return self.processes[-1]

    def log(self, host: int) -> pathlib.Path:
        """What was started there has printed."""
        return self.folder / f"host-{host}.log"

    def said(self) -> str:
        """Everything that anything has printed."""
        return "\n".join([self.run.output(), *(log.read_text()[-6000:] for log in self.folder.glob("host-*.log"))])


@contextlib.contextmanager
def cluster(
    model: pathlib.Path, folder: pathlib.Path, **changes: object
) -> Iterator[tuple[Cluster, subprocess.Popen[bytes]]]:
    """A run on three hosts, with what was started on the second."""
    with hosts(3) as made, runs_of_test(folder) as start:
        several = {"host": made.address(0), "actor_num_nodes": 2, "actor_num_gpus_per_node": 1}
        command = recipe(model, folder / "run", **(SHORT | several | changes), rollout_workers_elsewhere=1)
        run = start(made.on(0, [*command, "--no-gateway"]), folder / "run")
        started = Cluster(made, run, folder)
        try:
            started.start(2, ROLLOUT)
            yield started, started.start(1, NODE)
        finally:
            for process in started.processes:
                process.kill()
                process.wait()


def test_a_run_on_three_hosts_ends_everywhere(tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with cluster(tiny_dense, tmp_path, num_rollout=2, save_interval=None) as (started, node):
        assert started.run.wait() == ExitCode.OK, started.said()
        assert node.wait(END_S) == ExitCode.OK, started.said()
    steps = started.run.metrics()
    assert len(steps) == 2
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-4 for step in steps)


@pytest.fixture(scope="module")
def one_host(tiny_dense: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The same run with both ranks on one host."""
    folder = tmp_path_factory.mktemp("one-host")
    with runs_of_test(folder) as start:
        run = start(recipe(tiny_dense, folder / "run", **SHORT, actor_num_gpus_per_node=2), folder / "run")
        assert run.wait() == ExitCode.OK, run.output()
        yield run


def assert_equal(left: Run, right: Run) -> None:
    """Every step and the final weights are the same, bit for bit."""
    for name in ("train/loss", "train/grad_norm", "rollout/raw_reward", "rollout/response_tokens"):
        assert [step[name] for step in left.metrics()] == [step[name] for step in right.metrics()], name
    one, other = left.weights(), right.weights()
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_hosts_compute_what_one_host_does(tiny_dense: pathlib.Path, tmp_path: pathlib.Path, one_host: Run) -> None:
    with cluster(tiny_dense, tmp_path) as (started, node):
        assert started.run.wait() == ExitCode.OK, started.said()
        assert node.wait(END_S) == ExitCode.OK, started.said()
    assert len(started.run.metrics()) == STEPS
    assert_equal(started.run, one_host)


@pytest.mark.slow
def test_a_cut_link_and_a_lost_node_cost_time_and_nothing_else(
    tiny_dense: pathlib.Path, tmp_path: pathlib.Path, one_host: Run
) -> None:
    with cluster(tiny_dense, tmp_path, rank_timeout_s=10) as (started, _):
        started.run.wait_for_step(3)
        started.hosts.cut(1)
        cut_s = time.monotonic()
        started.run.wait_for_text("recovering")
        noticed_s = time.monotonic()
        assert "rank 1 on host-1 cannot be reached" in (started.run.run_dir / "logs" / "trainer-0.log").read_text()
        started.run.wait_for_text("node 1 of 2 not there")
        started.hosts.heal(1)
        healed_s = time.monotonic()
        started.run.wait_for_step(5)
        print(
            f"cut link noticed after {noticed_s - cut_s:.1f} s, "
            f"next step {time.monotonic() - healed_s:.1f} s after it was mended"
        )
        assert started.hosts.kill(1) >= 3
        killed_s = time.monotonic()
        node = started.start(1, NODE)
        assert started.run.wait() == ExitCode.OK, started.said()
        print(f"run ended {time.monotonic() - killed_s:.1f} s after node 1 was killed and started again")
        assert node.wait(END_S) == ExitCode.OK, started.said()
    assert_equal(started.run, one_host)
