"""`cogview2 submit --launcher hostfile` over two fake hosts: started, stopped, failed, lost, each told in plain words."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from fake_hosts import FakeHosts

from cogview2.launch import agent, cli, process
from cogview2.launch.status import log_file, table
from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.run_dir import RunDirectory

pytestmark = pytest.mark.distributed
STAGE = "train_tokenizer"


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHosts:
    hosts = FakeHosts(tmp_path / "fake hosts")
    monkeypatch.setenv("PATH", hosts.path)
    monkeypatch.setenv("HF_TOKEN", "submitting-shell-secret")
    monkeypatch.setattr(process, "PEER_SECONDS", 0.5)
    monkeypatch.chdir(tmp_path)
    return hosts


@pytest.fixture
def run(hosts: FakeHosts, tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "r u n s" / "quickstart").create(load_recipe("quickstart", []))


def submit(run: RunDirectory, hosts: FakeHosts, *more: str, stage: str = STAGE) -> int:
    words = ["--launcher", "hostfile", "--hosts", str(hosts.file), "--runs-dir", str(run.path.parent)]
    return cli.main(["submit", "quickstart", *words, "--stages", stage, *more])


def attempt_of(run: RunDirectory) -> Attempt:
    attempt = run.stage(STAGE).latest_attempt()
    assert attempt is not None
    return attempt


def when_all_ranks_wait(run: RunDirectory, do: list[int]) -> threading.Thread:
    """Send the signals `do` to ourselves, half a second apart, once four ranks have said their process ids."""

    def work() -> None:
        while (attempt := run.stage(STAGE).latest_attempt()) is None or len(attempt.pids()) < 4:
            time.sleep(0.02)
        for number in do:
            time.sleep(0.5)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def assert_nothing_runs(run: RunDirectory) -> None:
    for pid in attempt_of(run).pids().values():
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, f"rank process {pid} outlived its job"
            time.sleep(0.05)


def test_two_hosts_do_a_stage_and_again_nothing(
    run: RunDirectory, hosts: FakeHosts, capsys: pytest.CaptureFixture[str]
) -> None:
    change = [
        "--set",
        "launch.environment={NCCL_DEBUG: 'a b;$(touch canary)'}",
        "--set",
        "launch.interface=eth7",
    ]
    assert submit(run, hosts, *change) == 0
    assert run.is_done(STAGE)
    attempt = attempt_of(run)
    assert [outcome.rank for outcome in sorted(attempt.outcomes(), key=lambda o: o.rank)] == [0, 1, 2, 3]
    assert (attempt.path / "hostfile").read_text() == "127.0.0.1 slots=2\n127.0.0.2 slots=2\n"
    assert (attempt.path / "job.json").stat().st_mode & 0o777 == 0o600
    assert "rank 2 begins" in attempt.host_log("127.0.0.2").read_text()
    for rank in range(4):
        seen = json.loads((run.path / f"env-{rank}.json").read_text())
        assert seen["NCCL_DEBUG"] == "a b;$(touch canary)"
        assert seen["NCCL_SOCKET_IFNAME"] == seen["GLOO_SOCKET_IFNAME"] == "eth7"
        assert seen["DS_ACCELERATOR"] == "cpu" and seen["PYTHONSAFEPATH"] == "1" and seen["WDS_SECURE"] == "1"
        assert seen["MASTER_ADDR"] == "127.0.0.1" and int(seen["MASTER_PORT"]) > 1023
        assert not {"WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "HF_TOKEN"} & set(seen)
        assert seen["PATH"].split(":")[0] == str(Path(agent.sys.executable).parent)
        assert seen["HOST"] == hosts.names[rank // 2]
    for call in hosts.calls():
        assert "canary" not in call and "secret" not in call
    assert not (run.path / "canary").exists() and not Path("canary").exists()
    asked = len(hosts.calls())
    assert submit(run, hosts, *change) == 0
    assert "skipped: done before" in capsys.readouterr().out
    assert len(hosts.calls()) == asked + 2  # only the look at both
    assert not list(run.path.glob(".probe-*"))


def test_a_small_stage_uses_a_part_of_the_hosts_and_says_so(
    run: RunDirectory, hosts: FakeHosts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(run, hosts, "--set", "vqvae.train.global_batch=2", stage="train_vqvae") == 0
    said = capsys.readouterr().out
    assert "uses 1 of the 2 hosts (2 ranks): its global batch has no equal share for more" in said
    attempt = run.stage("train_vqvae").latest_attempt()
    assert attempt is not None and len(attempt.outcomes()) == 2
    assert (attempt.path / "hostfile").read_text() == "127.0.0.1 slots=2\n"
    assert sum("launch.agent" in call for call in hosts.calls()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_one_signal_lets_the_ranks_of_all_hosts_save(
    run: RunDirectory, hosts: FakeHosts, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    (run.path / "mode").write_text("wait")
    when_all_ranks_wait(run, [number])
    assert submit(run, hosts) == 75
    assert "saved at step 5; the same command goes on" in capsys.readouterr().out
    assert [outcome.code for outcome in attempt_of(run).outcomes()] == [75] * 4
    assert_nothing_runs(run)
    assert "interrupted" in table(run)


def test_the_second_ctrl_c_kills_on_all_hosts(
    run: RunDirectory, hosts: FakeHosts, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "mode").write_text("stubborn")
    when_all_ranks_wait(run, [signal.SIGINT, signal.SIGINT])
    begin = time.monotonic()
    assert submit(run, hosts) == 75
    assert time.monotonic() - begin < 15
    assert "stopped after" in capsys.readouterr().out
    assert_nothing_runs(run)


def test_ranks_that_do_not_stop_are_killed_after_the_grace(run: RunDirectory, hosts: FakeHosts) -> None:
    (run.path / "mode").write_text("stubborn")
    when_all_ranks_wait(run, [signal.SIGINT])
    assert submit(run, hosts, "--set", "launch.grace_seconds=1") == 75
    assert {outcome.reason for outcome in attempt_of(run).outcomes()} == {"killed"}
    assert_nothing_runs(run)


def test_the_first_rank_that_failed_is_named_with_its_host(
    run: RunDirectory, hosts: FakeHosts, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "mode").write_text("wait")
    (run.path / "mode-3").write_text("fail")
    assert submit(run, hosts) == 70
    out = capsys.readouterr().out
    assert "rank 3 on 127.0.0.2 failed first at step 17: NumericError: the loss of step 17 is nan" in out
    assert f"last lines of {attempt_of(run).host_log('127.0.0.2')}:" in out
    assert_nothing_runs(run)


def test_a_killed_rank_is_found_although_its_peers_report_first(
    run: RunDirectory, hosts: FakeHosts, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "mode").write_text("peer")
    (run.path / "mode-3").write_text("vanish")
    assert submit(run, hosts) == 1
    assert "rank 3 on 127.0.0.2 failed first: killed: the process was killed" in capsys.readouterr().out


def test_ranks_that_never_began_are_named(
    run: RunDirectory, hosts: FakeHosts, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "mode").write_text("wait")
    (run.path / "no-ranks-1").touch()
    assert submit(run, hosts) == 1
    out = capsys.readouterr().out
    assert "rank 2 on 127.0.0.2 failed first: not started: it never began" in out and "exit code 3" in out
    assert_nothing_runs(run)


def test_a_lost_host_is_named_and_its_peers_end(
    run: RunDirectory, hosts: FakeHosts, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "mode").write_text("wait")

    def lose() -> None:
        while (attempt := run.stage(STAGE).latest_attempt()) is None or len(attempt.pids()) < 4:
            time.sleep(0.02)
        ranks = os.getpgid(attempt.pids()[2])
        os.killpg(int((hosts.folder / "127.0.0.2.pid").read_text()), signal.SIGKILL)
        os.killpg(ranks, signal.SIGKILL)

    threading.Thread(target=lose, daemon=True).start()
    assert submit(run, hosts) == 1
    out = capsys.readouterr().out
    assert "host 127.0.0.2 (ranks 2 to 3) was lost: its connection ended and its ranks left no record" in out
    assert "failed first" not in out
    assert_nothing_runs(run)


def test_a_killed_launcher_stops_the_ranks(
    run: RunDirectory, hosts: FakeHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agents find the end of their standard input: the ranks save, as they do on a stop."""
    (run.path / "mode").write_text("wait")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        try:
            submit(run, hosts)
        finally:
            os._exit(0)
    while (attempt := run.stage(STAGE).latest_attempt()) is None or len(attempt.pids()) < 4:
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert_nothing_runs(run)
    assert {outcome.reason for outcome in attempt.outcomes()} == {"preempted"}


def test_login_messages_do_not_matter(run: RunDirectory, hosts: FakeHosts) -> None:
    hosts.behave("127.0.0.2", "printf 'Welcome\\nto node2, {1} user'")
    assert submit(run, hosts) == 0


def test_logs_of_a_job_that_began_nothing(run: RunDirectory, hosts: FakeHosts) -> None:
    (run.path / "no-ranks-0").touch()
    (run.path / "no-ranks-1").touch()
    assert submit(run, hosts) == 1
    assert log_file(run, None, 0).is_file()
