"""What happens to a job when a host, its network, its ranks' driver or a person takes something away; and the resume."""

import re
import signal
import time
from pathlib import Path

import pytest
import tiny_runs
from cluster_hosts import PATH, Program
from cluster_jobs import (
    COGLM,
    LONG,
    STOP_SECONDS,
    Cluster,
    assert_same_training,
    run_of,
    saved_steps,
    wait_for_checkpoint,
)

from cogview2.pipeline.errors import ExitCode
from cogview2.pipeline.run_dir import RunDirectory

pytestmark = pytest.mark.cluster


@pytest.fixture
def run(cluster: Cluster, prepared: tiny_runs.Finished, request: pytest.FixtureRequest) -> RunDirectory:
    return run_of(prepared, cluster.runs, re.sub(r"\W+", "-", request.node.name).strip("-"))


def _start(cluster: Cluster, run: RunDirectory, *settings: str, **environment: str) -> Program:
    hosts = cluster.hosts_file(cluster.lan.nodes[:2])
    sets = (*LONG, "launch.grace_seconds=20", *settings)
    return cluster.submit(run.path.name, hosts, settings=sets, **environment)


def _impatient_ssh(cluster: Cluster) -> Path:
    """Return a folder with an ssh that gives a silent host up after seconds, not after a minute: for a shorter test."""
    folder = cluster.folder / "programs"
    folder.mkdir()
    script = folder / "ssh"
    script.write_text('#!/bin/bash\nexec /usr/bin/ssh "${@/ServerAliveInterval=*/ServerAliveInterval=2}"\n')
    script.chmod(0o755)
    return folder


def _resume(cluster: Cluster, run: RunDirectory, straight: RunDirectory) -> None:
    steps = saved_steps(run)
    assert not run.is_done(COGLM) and 20 <= steps[-1] < 120
    cluster.finish(_start(cluster, run))
    assert_same_training(run, straight)
    assert not cluster.left_over(run.path.name)


def _expect_loss(cluster: Cluster, program: Program) -> None:
    """Wait for the driver to say that node2 is lost, and with it rank 1, and to leave with the code of a failure."""
    begin = time.monotonic()
    printed = cluster.finish(program, code=ExitCode.FAILED, seconds=STOP_SECONDS)
    print(f"the driver ended {time.monotonic() - begin:.1f} s after the loss")
    lines = [line for line in printed.splitlines() if "node2" in line and "lost" in line]
    assert any("rank 1" in line for line in lines), printed


def test_a_host_whose_processes_die(cluster: Cluster, run: RunDirectory, straight: RunDirectory) -> None:
    lost = cluster.lan.nodes[1]
    program = _start(cluster, run)
    wait_for_checkpoint(run, program, 20)
    lost.power_off()
    try:
        _expect_loss(cluster, program)
        cluster.wait_until_empty(run.path.name)
    finally:
        lost.power_on()
    _resume(cluster, run, straight)


def test_a_host_whose_network_is_gone(cluster: Cluster, run: RunDirectory, straight: RunDirectory) -> None:
    lost = cluster.lan.nodes[1]
    program = _start(cluster, run, "launch.grace_seconds=5", PATH=f"{_impatient_ssh(cluster)}:{PATH}")
    wait_for_checkpoint(run, program, 20)
    lost.link("down")
    try:
        with lost.hide(cluster.runs):  # the shared files were on the network too
            _expect_loss(cluster, program)
    finally:
        lost.power_off()  # what a person does before the host is used again
        lost.power_on()
    cluster.wait_until_empty(run.path.name)
    _resume(cluster, run, straight)


def test_a_stop_is_saved_on_all_hosts(cluster: Cluster, run: RunDirectory, straight: RunDirectory) -> None:
    program = _start(cluster, run)
    wait_for_checkpoint(run, program, 20)
    program.signal(signal.SIGINT)
    cluster.finish(program, code=ExitCode.REQUEUE, seconds=STOP_SECONDS)
    outcomes = run.stage(COGLM).attempts()[-1].outcomes()
    assert {outcome.rank: outcome.code for outcome in outcomes} == {0: ExitCode.REQUEUE, 1: ExitCode.REQUEUE}
    assert not cluster.left_over(run.path.name)
    _resume(cluster, run, straight)


def test_ranks_stop_when_their_driver_is_killed(
    cluster: Cluster, run: RunDirectory, straight: RunDirectory
) -> None:
    program = _start(cluster, run)
    wait_for_checkpoint(run, program, 20)
    program.signal(signal.SIGKILL)
    program.wait()
    cluster.wait_until_empty(run.path.name)
    outcomes = run.stage(COGLM).attempts()[-1].outcomes()
    assert {outcome.code for outcome in outcomes} == {ExitCode.REQUEUE}, "they had time to save"
    _resume(cluster, run, straight)
