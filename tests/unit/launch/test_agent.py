"""A host's agent: the environment of its ranks, its orders, and its place in the job."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cogview2.launch import agent
from cogview2.launch.agent import Agent, earlier_ranks, end_earlier_ranks, node_rank_of, rank_environment
from cogview2.launch.job import Host, JobSpec
from cogview2.launch.local import device_variables
from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.errors import LaunchError


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(
        "train_vqvae", tmp_path, 1, (Host("a", 2),), "a", 4711, {"NCCL_DEBUG": "INFO", "HOME": "/set"}
    )


def test_the_environment_is_the_hosts_without_what_names_a_rank(spec: JobSpec) -> None:
    base = {"HOME": "/h", "PATH": "/usr/bin", "LD_LIBRARY_PATH": "/cuda", "CUDA_VISIBLE_DEVICES": "4,5"}
    leaks = {
        name: "9"
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "CROSS_SIZE", "DS_ACCELERATOR")
    }
    leaks |= {"OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1", "PMIX_ID": "1", "TORCHELASTIC_RUN_ID": "1"}
    result = rank_environment(base | leaks, spec)
    assert not set(leaks) & set(result)
    assert result["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    assert (result["HOME"], result["LD_LIBRARY_PATH"], result["NCCL_DEBUG"]) == ("/set", "/cuda", "INFO")
    assert result["COGVIEW2_VISIBLE_DEVICES"] == "4,5"
    assert rank_environment({}, spec)["PATH"].startswith(f"{Path(sys.executable).parent}:/")


def test_a_stage_gets_the_gpus_that_the_host_gave() -> None:
    """DeepSpeed's launcher writes 0, 1, ... into CUDA_VISIBLE_DEVICES of every rank."""
    given = device_variables({"CUDA_VISIBLE_DEVICES": "4,5"})
    environment = dict(os.environ) | given | {"CUDA_VISIBLE_DEVICES": "0,1"}
    code = "import cogview2.stages, os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    argv = [sys.executable, "-c", code]
    assert subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout == "4,5\n"
    assert device_variables({"A": "b"}) == {"A": "b"}


@pytest.mark.parametrize(
    ("text", "environment", "expected"), [("1", {}, 1), ("slurm", {"SLURM_NODEID": "2"}, 2)]
)
def test_the_node_rank(text: str, environment: dict[str, str], expected: int) -> None:
    assert node_rank_of(text, environment, 3) == expected


@pytest.mark.parametrize(
    ("text", "environment"),
    [("3", {}), ("-1", {}), ("x", {}), ("", {}), ("slurm", {}), ("slurm", {"SLURM_NODEID": "7"})],
)
def test_no_node_rank(text: str, environment: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="hosts count from 0"):
        node_rank_of(text, environment, 3)


class Job:
    def __init__(self) -> None:
        self.said: list[str] = []

    def stop(self) -> None:
        self.said.append("stop")

    def kill(self) -> None:
        self.said.append("kill")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([b"stop\n"], ["stop", "stop"]),
        ([b"st", b"op\nki", b"ll\n"], ["stop", "kill", "stop"]),
        ([b"alive\n", b"nonsense\n"], ["stop"]),
        ([], ["stop"]),
    ],
)
def test_orders_and_their_end(written: list[bytes], expected: list[str]) -> None:
    reader, writer = os.pipe()
    job = Job()
    agent._Orders(job, reader).listen()  # type: ignore[arg-type]
    for part in written:
        os.write(writer, part)
        time.sleep(0.02)
    os.close(writer)
    deadline = time.monotonic() + 5
    while len(job.said) < len(expected) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert job.said == expected
    os.close(reader)


def test_a_launcher_that_falls_silent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(agent, "time", SimpleNamespace(monotonic=lambda: now[0]))
    orders = agent._Orders(Job(), 0)  # type: ignore[arg-type]
    assert not orders.silent()  # one that never said that it is there promised nothing
    orders._obey(b"alive\n")
    now[0] += agent.SILENCE_SECONDS - 1
    assert not orders.silent()
    now[0] += 2
    assert orders.silent()


def test_a_job_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agent.main(["--job", str(tmp_path / "job.json"), "--node-rank", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cogview2 agent on ") and "all hosts share" in error and "Traceback" not in error


def test_agent_and_probe_start_without_torch() -> None:
    code = (
        "import sys, cogview2.launch.agent, cogview2.launch.probe; "
        "print(sorted({'torch', 'deepspeed', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    argv = [sys.executable, "-c", code]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("script", "told", "expected"),
    [("exec sleep 30", True, ("stopped", 75)), ("exit 3", False, ("not started", 1))],
)
def test_ranks_that_never_began(tmp_path: Path, script: str, told: bool, expected: tuple[str, int]) -> None:
    """Because the job was told to stop before, or because they could not."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    spec = JobSpec("train_vqvae", tmp_path, 1, (Host("a", 2),), "a", 4711, {}, str(python), grace_seconds=5)
    spec.folder.mkdir(parents=True)
    reader, writer = os.pipe()
    if told:
        threading.Timer(0.5, os.write, (writer, b"stop\n")).start()
    before = os.getcwd()
    try:
        code = Agent(spec, 0, dict(os.environ)).run(reader)
    finally:
        os.chdir(before)
        os.close(writer)
    outcomes = Attempt(spec.folder).outcomes()
    assert [(outcome.reason, outcome.code) for outcome in outcomes] == [expected] * 2
    assert code == expected[1]


def test_ranks_of_earlier_attempts_are_ended_and_nobody_else(tmp_path: Path) -> None:
    def start(stage: str, run: Path, attempt: int, **variables: str) -> subprocess.Popen[bytes]:
        code = "import time; print(flush=True); time.sleep(60)"
        words = ["--module", f"cogview2.stages.{stage}", "--run-dir", str(run), "--attempt", str(attempt)]
        environment = {name: value for name, value in os.environ.items() if name != "RANK"} | variables
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words, "--more"], env=environment, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        return process

    orphans = [start("train_vqvae", tmp_path, 1, RANK="0"), start("train_vqvae", tmp_path, 2, RANK="9")]
    others = [
        start("train_vqvae", tmp_path, 3, RANK="0"),  # the same attempt: another host's name for this machine
        start("train_vqvae", tmp_path, 4, RANK="0"),  # a later one: this agent was slow
        start("train_vqvae", tmp_path, 1),  # a launcher
        start("train_vqvae", tmp_path / "other", 1, RANK="0"),
        start("pretrain_coglm", tmp_path, 1, RANK="0"),
    ]
    spec = JobSpec("train_vqvae", tmp_path, 3, (Host("a", 2),), "a", 4711)
    try:
        expected = sorted(process.pid for process in orphans)
        assert earlier_ranks(spec) == expected
        assert end_earlier_ranks(spec) == expected
        assert [process.wait(timeout=5) for process in orphans] == [-9, -9]
        assert [process.poll() for process in others] == [None] * 5
        assert end_earlier_ranks(spec) == []
    finally:
        for process in orphans + others:
            process.kill()
            process.wait()
            process.stdout.close()


def test_an_agent_ends_them_before_it_starts_its_own(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    spec.folder.mkdir(parents=True)
    order: list[str] = []
    monkeypatch.setattr(agent, "end_earlier_ranks", lambda told: order.append(f"end {told.stage}"))
    monkeypatch.setattr(agent.JobGroup, "run", lambda *_: order.append("run") or 1)
    monkeypatch.chdir(spec.run)
    Agent(spec, 0, {}).run(None)
    assert order == ["end train_vqvae", "run"]


def test_the_recipes_own_gpus_win(spec: JobSpec) -> None:
    own = JobSpec(**{**spec.__dict__, "environment": {"CUDA_VISIBLE_DEVICES": "4,5"}})
    result = rank_environment({"PATH": "/b", "COGVIEW2_VISIBLE_DEVICES": "0,1"}, own)
    assert result["COGVIEW2_VISIBLE_DEVICES"] == result["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert "COGVIEW2_VISIBLE_DEVICES" not in rank_environment({"COGVIEW2_VISIBLE_DEVICES": "0"}, spec)
