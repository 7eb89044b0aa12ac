"""mpirun: which one it is, what is rendered for it, and that values of variables never stand in a command line."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_programs import FakePrograms

from cogview2.launch import launchers, mpi
from cogview2.launch.job import Host, JobSpec
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.errors import LaunchError

HYDRA = "HYDRA build details:\n    Version:    4.0.2\n"
VALUES = {
    "A": "two words",
    "B": 'it\'s "quoted" $(touch x) `touch x` ${HOME} ; & | # * ? {0..3} ~',
    "C": "",
    "D": "line one\nline two",
    "E": '{"key": [1, 2]}',
    "F": "a=b;c=d,e%n",
    "G": "grün 猫",
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePrograms:
    made = FakePrograms(tmp_path / "fakes")
    for name, value in made.variables.items():
        monkeypatch.setenv(name, value)
    for name in mpi._ALLOW_ROOT:
        monkeypatch.setenv(name, "1")
    return made


def spec(python: str = sys.executable, **changes: object) -> JobSpec:
    values: dict = {
        "stage": "pretrain_coglm",
        "run": Path("/r/my {0..3} run"),
        "attempt": 2,
        "hosts": (Host("n1", 2), Host("n2", 1)),
        "master_addr": "n1",
        "master_port": 0,
        "environment": VALUES,
        "python": python,
    }
    return JobSpec(**(values | changes))


def launcher(folder: Path, *overrides: str) -> mpi.MpiLauncher:
    (folder / "hosts").write_text("n1 slots=2\nn2 slots=1\n")
    made = launchers.make("mpi", folder / "hosts")
    made.hosts(load_recipe("quickstart", list(overrides)))
    return made


def test_open_mpi(fakes: FakePrograms, tmp_path: Path) -> None:
    overrides = ["launch.interface=ib0", "launch.ssh.user=ann", "launch.ssh.port=2222"]
    (command,) = launcher(tmp_path, *overrides).commands(spec())
    assert command.argv == (
        *("mpirun", "-n", "3", "--host", "n1:2,n2:1", "--map-by", "slot", "--bind-to", "none"),
        *("--mca", "oob_tcp_if_include", "ib0", "--mca", "btl_tcp_if_include", "ib0"),
        *("--mca", "plm_rsh_args", "-l ann -p 2222"),
        *("-x", "A", "-x", "B", "-x", "C", "-x", "D", "-x", "E", "-x", "F", "-x", "G"),
        *(sys.executable, "-P", "-m", "cogview2.stages.pretrain_coglm", "--run-dir", "/r/my {0..3} run"),
        *("--attempt", "2"),
    )
    assert command.stop == "SIGUSR1"
    assert command.environment.items() >= VALUES.items()


def test_mpich(fakes: FakePrograms, tmp_path: Path) -> None:
    (fakes.folder / "mpirun-version").write_text(HYDRA)
    overrides = ["launch.interface=ib0", "launch.ssh.user=ann", "launch.ssh.port=2222"]
    (command,) = launcher(tmp_path, *overrides).commands(spec(master_port=29777))
    assert command.argv == (
        *("mpirun", "-n", "3", "-hosts", "n1:2,n2:1", "-bind-to", "none", "-iface", "ib0"),
        *("-genvlist", "A,B,C,D,E,F,G,MASTER_PORT"),
        *(sys.executable, "-P", "-m", "cogview2.stages.pretrain_coglm", "--run-dir", "/r/my {0..3} run"),
        *("--attempt", "2"),
    )
    assert command.environment["HYDRA_LAUNCHER_EXTRA_ARGS"] == "-l ann -p 2222"
    assert command.environment["MASTER_PORT"] == "29777"


@pytest.mark.parametrize("version", ["mpirun (Open MPI) 4.1.4", HYDRA])
def test_values_and_words_arrive_as_they_are(fakes: FakePrograms, tmp_path: Path, version: str) -> None:
    (fakes.folder / "mpirun-version").write_text(version)
    (command,) = launcher(tmp_path).commands(spec(str(fakes.python)))
    secret = {"UNASKED": "of the submitting shell"}
    assert fakes.run(command.argv, {**command.environment, **secret}) == 0
    (arrived,) = fakes.arrived()
    assert arrived.argv[1:] == [
        *("-P", "-m", "cogview2.stages.pretrain_coglm", "--run-dir", "/r/my {0..3} run", "--attempt", "2"),
    ]
    assert arrived.environment.items() >= VALUES.items()
    assert "UNASKED" not in arrived.environment
    assert list((fakes.folder / "cwd").iterdir()) == []
    words = (fakes.folder / "mpirun.argv").read_text()
    assert "touch" not in words and "quoted" not in words


def test_an_unknown_or_missing_mpirun_is_one_sentence(
    fakes: FakePrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fakes.folder / "mpirun-version").write_text("Intel(R) MPI Library for Linux* OS, Version 2021.6")
    with pytest.raises(LaunchError, match="neither Open MPI nor MPICH"):
        launcher(tmp_path).commands(spec())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="mpirun is not on the PATH; install Open MPI or MPICH"):
        launcher(tmp_path).commands(spec())


def test_root_is_told_before_open_mpi_refuses(monkeypatch: pytest.MonkeyPatch, fakes: FakePrograms) -> None:
    here = launchers.make("mpi")
    run = SimpleNamespace(path=Path("/r/q"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    here.check(run, load_recipe("quickstart", []))
    monkeypatch.delenv("OMPI_ALLOW_RUN_AS_ROOT")
    with pytest.raises(LaunchError, match="Open MPI refuses to run as root.* OMPI_ALLOW_RUN_AS_ROOT=1 and"):
        here.check(run, load_recipe("quickstart", []))
    said = 'launch.environment={"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}'
    here.check(run, load_recipe("quickstart", [said]))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    here.check(run, load_recipe("quickstart", []))
    (fakes.folder / "mpirun-version").write_text(HYDRA)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    here.check(run, load_recipe("quickstart", []))


def test_mpi4py_is_looked_for_before_the_start(monkeypatch: pytest.MonkeyPatch, fakes: FakePrograms) -> None:
    recipe = load_recipe("quickstart", [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="mpi4py is not installed.* pip install mpi4py on every host"):
        launchers.make("mpi").check(SimpleNamespace(path=Path("/r/q")), recipe)


@pytest.mark.parametrize("value", ["$(touch x)", 'x"; touch x; "', "`touch x`", "a\\", "a\nb"])
def test_settings_that_open_mpi_repeats_to_remote_shells_are_refused(
    fakes: FakePrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("OMPI_MCA_btl_base_verbose", value)
    with pytest.raises(LaunchError, match="the variable OMPI_MCA_btl_base_verbose is .* mca-params.conf"):
        launcher(tmp_path).commands(spec())
    monkeypatch.delenv("OMPI_MCA_btl_base_verbose")
    with pytest.raises(LaunchError, match="the variable OMPI_MCA_BTL is"):
        launcher(tmp_path).commands(spec(environment={"OMPI_MCA_BTL": value}))
    (fakes.folder / "mpirun-version").write_text(HYDRA)
    launcher(tmp_path).commands(spec(environment={"OMPI_MCA_BTL": value}))  # nothing to it


def test_honest_settings_of_open_mpi_stay(
    fakes: FakePrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_MCA_btl", "^openib,tcp self")
    launcher(tmp_path).commands(spec())


def test_without_a_host_list_this_machine_runs_the_ranks(
    fakes: FakePrograms, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = launchers.make("mpi")
    recipe = load_recipe("quickstart", ["launch.ranks_per_node=4"])
    assert here.hosts(recipe) == (Host("localhost", 4),)
    assert here.rendezvous(recipe) == ("localhost", 0)
    monkeypatch.setattr("cogview2.launch.local.gpu_count", lambda *_: 4)
    assert not here.uses_cpu(recipe)
    assert here.uses_cpu(load_recipe("quickstart", ["launch.ranks_per_node=5"]))
