"""Every command of docs/operations.md, executed in its order on a cluster; and what two of them trained."""

import math
import re
from pathlib import Path

import pytest
import tiny_runs
from cluster_jobs import COGLM, LONG, Cluster, assert_same_training, run_of, saved_steps, wait_for_checkpoint
from cluster_slurm import Slurm

from cogview2.pipeline.config.stages import STAGES
from cogview2.pipeline.run_dir import RunDirectory

pytestmark = pytest.mark.cluster
DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
NAME = "tiny"
SLURM_NAME = f"{NAME}-slurm"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\s*\$?\s*(cogview2|squeue|scancel|sbatch|mpirun|ssh|make)\b", re.MULTILINE)


def _fences() -> list[tuple[str, str]]:
    return _FENCE.findall(DOCUMENT.read_text(encoding="utf-8"))


def _commands() -> list[str]:
    """Return the lines of the document's bash blocks, continued lines joined."""
    text = "".join(block for language, block in _fences() if language == "bash")
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_commands_stand_only_in_bash_blocks() -> None:
    assert all(not _COMMAND.search(block) for language, block in _fences() if language != "bash")
    assert len(_commands()) == len(set(_commands())) + 2, "two commands are there twice: the resumed ones"


def test_commands_in_running_text_exist(cluster: Cluster) -> None:
    named = set(re.findall(r"`cogview2 ([a-z]+)", DOCUMENT.read_text(encoding="utf-8")))
    shown = cluster.lan.driver.run("cogview2", "--help").stdout
    assert {name for name in named if not re.search(rf"^ +{name} ", shown, re.MULTILINE)} == set()


class _Reader:
    """Does what the document says, and waits where a reader would."""

    def __init__(self, cluster: Cluster, slurm: Slurm, prepared: tiny_runs.Finished) -> None:
        self.cluster = cluster
        self.slurm = slurm
        self.prepared = prepared
        self.jobs: list[int] = []

    def follow(self, command: str) -> None:
        words = command.replace("RECIPE", str(self.cluster.recipe)).replace("NAME", NAME)
        slurm = "--launcher slurm" in command and "--dry-run" not in command
        known = set(self.slurm.jobs())
        if slurm and not known:
            run_of(
                self.prepared, self.cluster.runs, SLURM_NAME
            )  # so that Slurm has three stages to run, not six
        if command.startswith("scancel"):
            wait_for_checkpoint(RunDirectory(self.cluster.runs / SLURM_NAME), None, 20)
        done = self.cluster.lan.driver.run(
            "bash", "-euc", words, check=False, seconds=300.0, folder=self.cluster.folder
        )
        print(f"$ {words}\n{done.stdout}{done.stderr}")
        assert done.returncode == 0, f"{words} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
        if slurm:
            self.jobs = sorted(set(self.slurm.jobs()) - known)
        if command.startswith("scancel"):
            # Stopped with its work saved, but not requeued: for Slurm it failed, and what waits for it is cancelled.
            states = ["FAILED", *["CANCELLED"] * (len(self.jobs) - 1)]
            self.slurm.wait_until(dict(zip(self.jobs, states, strict=True)))


def test_every_command_works(
    cluster: Cluster, slurm: Slurm, prepared: tiny_runs.Finished, straight: RunDirectory
) -> None:
    shape = ("launch.slurm.nodes=2", "launch.ranks_per_node=1", "launch.slurm.gpus=false")
    cluster.recipe = cluster.write_recipe(NAME, *LONG, *shape)
    assert cluster.hosts_file(cluster.lan.nodes[:2]).name == "hosts.txt"
    reader = _Reader(cluster, slurm, prepared)
    for command in _commands():
        reader.follow(command)
    slurm.wait_until(dict.fromkeys(reader.jobs, "COMPLETED"))

    whole, by_slurm = RunDirectory(cluster.runs / NAME), RunDirectory(cluster.runs / SLURM_NAME)
    for run in (whole, by_slurm):
        assert all(run.is_done(stage) for stage in STAGES)
        assert_same_training(run, straight)
    assert_same_training(whole, prepared.run, "train_vqvae")
    shards = tiny_runs.digests(whole.stage("shard_dataset").output)
    assert shards == tiny_runs.digests(prepared.run.stage("shard_dataset").output)
    assert all(math.isfinite(tiny_runs.evaluation(run)["fid"]["fid_0"]) for run in (whole, by_slurm))
    assert len(by_slurm.stage(COGLM).attempts()) == 2 and saved_steps(by_slurm)[-1] == 120
    assert not cluster.left_over(NAME)
