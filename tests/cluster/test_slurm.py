"""`cogview2 submit --launcher slurm` on two nodes of a real Slurm: preemption, and a stage that fails.

A whole chain of jobs is in test_operations.py.
"""

import shutil

import pytest
import tiny_runs
from cluster_jobs import (
    COGLM,
    LONG,
    Cluster,
    assert_same_training,
    run_of,
    saved_steps,
    wait_for_checkpoint,
)
from cluster_slurm import Slurm

from cogview2.pipeline.run_dir import RunDirectory

pytestmark = pytest.mark.cluster
SHAPE = ("launch.slurm.nodes=2", "launch.ranks_per_node=1", "launch.slurm.gpus=false")


def _submit(
    cluster: Cluster, slurm: Slurm, name: str, *words: str, settings: tuple[str, ...] = ()
) -> list[int]:
    """Submit a run; return the numbers of its jobs, in their order."""
    before = set(slurm.jobs())
    argv = cluster.arguments("submit", name, "--launcher", "slurm", *words, settings=(*SHAPE, *settings))
    cluster.lan.driver.run(*argv, folder=cluster.folder)
    return sorted(set(slurm.jobs()) - before)


def test_a_preempted_job_saves_comes_back_and_ends(
    cluster: Cluster, slurm: Slurm, prepared: tiny_runs.Finished, straight: RunDirectory
) -> None:
    run = run_of(prepared, cluster.runs, "preempted")
    (job,) = _submit(cluster, slurm, "preempted", "--stages", COGLM, settings=LONG)
    wait_for_checkpoint(run, None, 20)
    # What Slurm itself sends `signal_seconds` before the time limit, and to a job that it preempts.
    cluster.lan.driver.run("scancel", "--signal=USR1", "--batch", str(job))
    slurm.wait_until({job: "PENDING"})
    steps = saved_steps(run)
    assert 20 <= steps[-1] < 120 and not run.is_done(COGLM)
    slurm.begin_soon(job)
    slurm.wait_until({job: "COMPLETED"})
    assert_same_training(run, straight)
    assert len(run.stage(COGLM).attempts()) == 2


def test_what_depends_on_a_failed_stage_is_cancelled(
    cluster: Cluster, slurm: Slurm, prepared: tiny_runs.Finished
) -> None:
    run = run_of(prepared, cluster.runs, "failing")
    # Ranks start, and find their data damaged.
    for shard in (run.stage("shard_dataset").output / "train").glob("*.tar"):
        shutil.copy(run.recipe_path, shard)
    jobs = _submit(cluster, slurm, "failing", "--stages", "pretrain_coglm..evaluate")
    slurm.wait_until(dict(zip(jobs, ["FAILED", "CANCELLED", "CANCELLED"], strict=True)))
    assert not run.is_done(COGLM)
    for stage in ("finetune_superres", "evaluate"):
        assert not run.stage(stage).attempts(), stage
