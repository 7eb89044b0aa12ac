"""One description of a job: ranks of hosts, commands, and the file that agents read."""

import json
import sys
from pathlib import Path

import pytest

from cogview2.launch.job import Host, JobSpec
from cogview2.pipeline.errors import CogView2Error, LaunchError
from cogview2.pipeline.stage_dir import StageDirectory


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    StageDirectory(tmp_path / "stages" / "train_vqvae", "train_vqvae").new_attempt()
    return JobSpec(
        stage="train_vqvae",
        run=tmp_path,
        attempt=1,
        hosts=(Host("a", 2), Host("b", 3), Host("c", 1)),
        master_addr="a",
        master_port=4711,
        environment={"X": "a b\n'$(touch canary)", "EMPTY": ""},
        grace_seconds=7.5,
    )


def test_ranks_follow_the_order_of_the_hosts(spec: JobSpec) -> None:
    slow = [(index, host.name) for index, host in enumerate(spec.hosts) for _ in range(host.slots)]
    assert spec.ranks == len(slow) == 6
    for rank, (index, name) in enumerate(slow):
        assert rank in spec.ranks_of(index)
        assert spec.host_of(rank) == name
    with pytest.raises(LaunchError, match="ranks 0 to 5, not 6"):
        spec.host_of(6)


def test_what_is_written_is_what_is_read(spec: JobSpec) -> None:
    spec.write()
    assert JobSpec.read(spec.file) == spec
    assert spec.file.stat().st_mode & 0o777 == 0o600
    assert spec.hostfile.read_text() == "a slots=2\nb slots=3\nc slots=1\n"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hosts", [{"name": "-oProxyCommand=touch canary", "slots": 1}]),
        ("hosts", [{"name": "a\nb", "slots": 1}]),
        ("hosts", [{"name": "a", "slots": 0}]),
        ("hosts", []),
        ("stage", "../../x"),
        ("environment", {"A B": "1"}),
        ("environment", {"A": "1\0"}),
        ("environment", ["A"]),
        ("master_port", "x"),
        ("run", "/elsewhere"),
    ],
)
def test_a_description_that_no_launcher_writes_is_refused(spec: JobSpec, key: str, value: object) -> None:
    spec.write()
    spec.file.write_text(json.dumps(json.loads(spec.file.read_text()) | {key: value}))
    with pytest.raises(CogView2Error):
        JobSpec.read(spec.file)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}"])
def test_a_missing_or_damaged_file_is_refused(spec: JobSpec, text: str | None) -> None:
    if text is not None:
        spec.file.write_text(text)
    with pytest.raises(LaunchError, match=r"cannot read the job .* all hosts share"):
        JobSpec.read(spec.file)


def test_commands(spec: JobSpec) -> None:
    argv = spec.runner_argv(1)
    assert argv[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert "--no_ssh" in argv and argv[argv.index("--node_rank") + 1] == "1"
    assert argv[argv.index("--hostfile") + 1] == str(spec.hostfile)
    assert argv[argv.index("--module") + 1] == "cogview2.stages.train_vqvae"
    assert not any("canary" in word for word in argv)
    assert spec.agent_argv("slurm")[-4:] == ["--job", str(spec.file), "--node-rank", "slurm"]


def test_deepspeed_reads_our_hostfile_and_command_line(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own parser: the hosts in our order, and every option that we give."""
    from deepspeed.launcher import runner

    spec.write()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked = runner.parse_args(spec.runner_argv(2)[3:])
    assert (asked.node_rank, asked.no_ssh, asked.module, asked.no_local_rank) == (2, True, True, True)
    assert (asked.master_addr, asked.master_port) == ("a", 4711)
    assert asked.user_args == ["--run-dir", str(spec.run), "--attempt", "1"]
    pool = runner.fetch_hostfile(asked.hostfile)
    assert list(pool.items()) == [(host.name, host.slots) for host in spec.hosts]
