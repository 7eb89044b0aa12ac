"""The local launcher: the DeepSpeed command line, the environment, and what counts as a GPU."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from cogview2.launch import local
from cogview2.launch.job import Command, JobSpec
from cogview2.launch.launchers import LocalLauncher, job_spec
from cogview2.launch.process import JobGroup, group_members
from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.stage_dir import StageDirectory


def spec_of(attempt: Attempt, run: Path) -> JobSpec:
    recipe = load_recipe(
        "quickstart", ["launch.ranks=2", "launch.threads_per_rank=1", "launch.environment={NCCL_DEBUG: INFO}"]
    )
    return job_spec(LocalLauncher(), recipe, run, "train_vqvae", attempt.number)


def test_command(tmp_path: Path) -> None:
    attempt = StageDirectory(tmp_path, "train_vqvae").new_attempt()
    (command,) = LocalLauncher().commands(spec_of(attempt, Path("/r u n")))
    argv = list(command.argv)
    assert command.stop == "ranks"
    assert argv[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert argv[argv.index("--num_gpus") + 1] == "2"
    assert argv[argv.index("--master_addr") + 1] == "127.0.0.1"
    assert int(argv[argv.index("--master_port") + 1]) > 0
    assert argv[argv.index("--module") + 1 :] == [
        "cogview2.stages.train_vqvae",
        "--run-dir",
        "/r u n",
        "--attempt",
        "1",
    ]
    assert argv[argv.index("--hostfile") + 1] == "/dev/null"


def test_ports_are_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", local.free_port()))


@pytest.mark.parametrize(
    ("devices", "visible", "expected"),
    [
        ([], None, 0),
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], None, 2),
        (["nvidia0", "nvidia1"], "1", 1),
        (["nvidia0"], "", 0),
        (["nvidia0"], "-1", 0),
        (["nvidia0"], "0,1,2", 1),
    ],
)
def test_gpus_are_counted_without_torch(
    tmp_path: Path, devices: list[str], visible: str | None, expected: int
) -> None:
    for name in devices:
        (tmp_path / name).touch()
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert local.gpu_count(environment, tmp_path) == expected
    assert local.uses_cpu(environment, 1, tmp_path) == (expected < 1)
    assert local.uses_cpu(environment, 3, tmp_path)


def test_environment_keeps_the_base_and_sets_what_libraries_read_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HOME": "/h", "OMP_NUM_THREADS": "64", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    attempt = StageDirectory(tmp_path, "train_vqvae").new_attempt()
    result = LocalLauncher().commands(spec_of(attempt, tmp_path))[0].environment
    assert result["HOME"] == "/h"
    assert result["OMP_NUM_THREADS"] == "1"
    assert result["WDS_SECURE"] == "1"
    assert result["DS_ACCELERATOR"] == "cpu"
    assert result["NCCL_DEBUG"] == "INFO"


RANK = """
import os, pathlib, signal, sys, time
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], sys.argv[1:], flush=True)
from cogview2.pipeline.attempt import Attempt
attempt = Attempt(pathlib.Path(sys.argv[1]))
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
attempt.write_pid(int(os.environ["RANK"]))
while not stop:
    time.sleep(0.05)
time.sleep(1)
attempt.write_outcome(int(os.environ["RANK"]), "preempted", 75, 1, "saved")
sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_of_the_real_launcher_get_one_signal_each_and_save(tmp_path: Path) -> None:
    """DeepSpeed's own runner would die and orphan them; ours goes to the ranks."""
    (tmp_path / "fake_rank_module.py").write_text(RANK)
    attempt = StageDirectory(tmp_path, "train_vqvae").new_attempt()
    command = LocalLauncher().commands(spec_of(attempt, tmp_path))[0]
    argv = list(command.argv)
    argv[argv.index("--module") + 1 :] = ["fake_rank_module", str(attempt.path), "a b", "{x}"]
    environment = dict(command.environment) | {"PYTHONPATH": str(tmp_path)}

    def stop() -> None:
        while len(attempt.pids()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    JobGroup([Command(tuple(argv), environment, "local", "ranks")], attempt).run(lambda: None)
    log = attempt.launcher_log.read_text()
    assert "rank 0 of 2" in log and "rank 1 of 2" in log and "'a b', '{x}'" in log, log
    assert sorted(outcome.rank for outcome in attempt.outcomes()) == [0, 1]
    assert group_members(next(iter(attempt.pids().values()))) == []
