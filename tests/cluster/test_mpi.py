"""Ranks that mpirun and DeepSpeed's own launchers start on two hosts: the same training, a stop that saves, no strangers."""

import signal
import sys
from pathlib import Path

import pytest
import tiny_runs
from cluster_hosts import Program
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
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
"""The hosts of the tests run as root, as containers do."""
STARTERS = ("mpi", "openmpi", "pdsh")


def _submit(cluster: Cluster, launcher: str, name: str, *settings: str) -> Program:
    hosts = cluster.hosts_file(cluster.lan.nodes[:2])
    words = ["--launcher", launcher, "--hosts", str(hosts), "--stages", COGLM]
    argv = cluster.arguments("submit", name, *words, settings=settings)
    return cluster.lan.driver.start(*argv, folder=cluster.folder, **ROOT)


def _rank_words(run: RunDirectory) -> list[str]:
    """Return what a rank of a bare mpirun executes."""
    return [
        sys.executable,
        "-P",
        "-m",
        f"cogview2.stages.{COGLM}",
        "--run-dir",
        str(run.path),
        "--attempt",
        "1",
    ]


@pytest.mark.parametrize("launcher", STARTERS)
def test_two_hosts_train_as_two_local_ranks(
    launcher: str, cluster: Cluster, prepared: tiny_runs.Finished
) -> None:
    run = run_of(prepared, cluster.runs, f"by-{launcher}")
    cluster.finish(_submit(cluster, launcher, run.path.name))
    assert_same_training(run, prepared.run)
    outcomes = run.stage(COGLM).attempts()[-1].outcomes()
    assert {outcome.rank: outcome.host for outcome in outcomes} == {0: "node1", 1: "node2"}
    cluster.wait_until_empty(run.path.name, 20.0)


@pytest.mark.parametrize("launcher", STARTERS)
def test_a_stop_saves_and_the_same_command_goes_on(
    launcher: str, cluster: Cluster, prepared: tiny_runs.Finished, straight: RunDirectory
) -> None:
    run = run_of(prepared, cluster.runs, f"stopped-{launcher}")
    program = _submit(cluster, launcher, run.path.name, *LONG)
    wait_for_checkpoint(run, program, 10)
    bystander = cluster.lan.nodes[0].start(
        sys.executable, "-c", "import time; time.sleep(300)", "-u", "-m", "deepspeed.launcher.launch"
    )
    program.signal(signal.SIGTERM)
    printed = cluster.finish(program, code=ExitCode.REQUEUE)
    assert "is saved; the same command goes on from there" in printed
    assert not bystander.ended  # DeepSpeed's own abort would have ended it
    bystander.signal(signal.SIGKILL)
    cluster.wait_until_empty(run.path.name, STOP_SECONDS)
    reached = saved_steps(run)[-1]
    assert 10 <= reached < 120
    cluster.finish(_submit(cluster, launcher, run.path.name, *LONG))
    assert_same_training(run, straight)


@pytest.mark.parametrize("launcher", STARTERS)
def test_ranks_save_when_their_launcher_is_killed(
    launcher: str, cluster: Cluster, prepared: tiny_runs.Finished
) -> None:
    run = run_of(prepared, cluster.runs, f"orphaned-{launcher}")
    program = _submit(cluster, launcher, run.path.name, *LONG)
    wait_for_checkpoint(run, program, 10)
    program.signal(signal.SIGKILL)
    cluster.wait_until_empty(run.path.name, STOP_SECONDS)
    outcomes = run.stage(COGLM).attempts()[-1].outcomes()
    assert [outcome.reason for outcome in outcomes] == ["preempted"] * 2


def test_ranks_of_a_bare_mpirun_find_each_other(cluster: Cluster, prepared: tiny_runs.Finished) -> None:
    """Nobody wrote a job.json: the stage module under mpirun, by hand."""
    run = run_of(prepared, cluster.runs, "bare")
    attempt = run.stage(COGLM).new_attempt()
    names = ",".join(node.name for node in cluster.lan.nodes[:2])
    driver = cluster.lan.driver
    settings = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "WDS_SECURE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    passed = [word for name in settings for word in ("-x", name)]
    mpirun = ["mpirun", "-n", "2", "--host", names, *passed, *_rank_words(run)]
    driver.run(*mpirun, folder=cluster.folder, seconds=150.0, **ROOT, **settings)
    assert [outcome.code for outcome in attempt.outcomes()] == [0, 0]
    assert_same_training(run, prepared.run)


def test_hosts_that_do_not_share_the_run_are_named(
    cluster: Cluster, prepared: tiny_runs.Finished, tmp_path: Path
) -> None:
    """Found by the ranks themselves, over MPI, before any of them works."""
    run = run_of(prepared, cluster.runs, "torn")
    attempt = run.stage(COGLM).new_attempt()
    first, second = cluster.lan.nodes[:2]
    mpirun = [
        "mpirun",
        "-n",
        "2",
        "--host",
        f"{first.name},{second.name}",
        "-x",
        "OMP_NUM_THREADS",
        *_rank_words(run),
    ]
    with second.replace(run.recipe_path, "name: another\n"):
        done = cluster.lan.driver.run(
            *mpirun, folder=cluster.folder, check=False, OMP_NUM_THREADS="1", **ROOT
        )
    assert done.returncode == ExitCode.FAILED
    assert f"node2 has {run.recipe_path}" in done.stderr
    assert "keep the run on a file system that all hosts share" in done.stderr
    assert {outcome.reason for outcome in attempt.outcomes()} == {"LaunchError"}
