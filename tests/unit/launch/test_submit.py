"""`cogview2 submit --launcher hostfile` before anything is started: what it would do, and what it refuses."""

from pathlib import Path

import pytest
from fake_hosts import FakeHosts

from cogview2.launch import agent, cli
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.run_dir import RunDirectory

STAGE = "train_tokenizer"


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHosts:
    hosts = FakeHosts(tmp_path / "fake hosts")
    monkeypatch.setenv("PATH", hosts.path)
    monkeypatch.chdir(tmp_path)
    return hosts


@pytest.fixture
def run(hosts: FakeHosts, tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "r u n s" / "quickstart").create(load_recipe("quickstart", []))


def submit(run: RunDirectory, hosts: FakeHosts) -> int:
    words = ["--launcher", "hostfile", "--hosts", str(hosts.file), "--runs-dir", str(run.path.parent)]
    return cli.main(["submit", "quickstart", *words, "--stages", STAGE])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("unreachable", "127.0.0.2: unreachable: ssh: connect to host 127.0.0.2 port 22: No route to host"),
        ("instead exit 7", "127.0.0.2: gave no usable answer (exit code 7: no message)"),
        ("instead echo 'cogview2-probe {'", "127.0.0.2: gave no usable answer"),
        ("instead echo bash: /x/python: No such file or directory >&2; exit 127", "127.0.0.2: has no "),
    ],
)
def test_a_host_that_cannot_be_used_is_named_and_nothing_is_started(
    run: RunDirectory, hosts: FakeHosts, capsys: pytest.CaptureFixture[str], said: str, expected: str
) -> None:
    hosts.behave("127.0.0.2", said)
    assert submit(run, hosts) == 1
    error = capsys.readouterr().err
    assert "1 of 2 hosts cannot run this job, nothing was started:" in error and expected in error
    assert run.stage(STAGE).attempts() == []
    assert all("launch.agent" not in call for call in hosts.calls())


def test_the_dry_run_prints_the_commands_and_touches_nothing(
    hosts: FakeHosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    words = ["submit", "quickstart", "--launcher", "hostfile", "--hosts", str(hosts.file), "--dry-run"]
    more = ["--set", "launch.environment={NCCL_DEBUG: 'a b', MY_API_KEY: hush}", "--stages", "train_vqvae"]
    assert cli.main([*words, *more]) == 0
    out = capsys.readouterr().out
    python = agent.sys.executable
    job = tmp_path / "runs/quickstart/stages/train_vqvae/attempts/0001/job.json"
    remote = f"-- 127.0.0.2 '{python} -P -m cogview2.launch.agent --job {job} --node-rank 1'"
    assert remote in out
    assert "--no_ssh --node_rank 1 --master_addr 127.0.0.1 --master_port '<free port of 127.0.0.1>'" in out
    assert "NCCL_DEBUG='a b'" in out and "MY_API_KEY='(redacted)'" in out and "hush" not in out
    assert hosts.calls() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_contradiction_is_refused_before_any_host_is_asked(
    hosts: FakeHosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", "quickstart", "--launcher", "hostfile", "--hosts", str(hosts.file)]
    assert cli.main([*words, "--set", "coglm.train.global_batch=30"]) == 78
    assert "does not split over 4" in capsys.readouterr().err
    assert hosts.calls() == [] and not (tmp_path / "runs").exists()


def test_doctor_shows_all_hosts(
    run: RunDirectory, hosts: FakeHosts, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", "--hosts", str(hosts.file), "--runs-dir", str(run.path.parent)]
    assert cli.main(words) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["host", "127.0.0.1", "127.0.0.2"]
    assert rows[2].split()[-1] == "good"
    hosts.behave("127.0.0.2", "unreachable")
    assert cli.main(words) == 1
    assert "127.0.0.2: unreachable" in capsys.readouterr().out
    assert cli.main(["doctor", "--hosts", str(hosts.file), "--runs-dir", "not there yet"]) == 1
    assert "was not looked at" in capsys.readouterr().out
