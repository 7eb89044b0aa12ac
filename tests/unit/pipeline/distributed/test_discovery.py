"""Ranks under mpirun: found over MPI, whose Python module is a fake of threads here; and who is refused."""

import os
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cogview2.pipeline.distributed import discovery, process
from cogview2.pipeline.errors import LaunchError
from cogview2.pipeline.run_dir import RunDirectory

RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK"),
    *("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
)


class FakeMpi:
    """An MPI whose ranks are threads; each collective is a list that all of them fill."""

    def __init__(self, hosts: list[str]) -> None:
        self.hosts = hosts
        self.here = threading.local()
        self.gate = threading.Barrier(len(hosts), timeout=20)
        self.slots: list[Any] = [None] * len(hosts)
        self.initialized: set[int] = set()
        self.finalized: set[int] = set()
        self.COMM_WORLD = self

    def Is_initialized(self) -> bool:  # noqa: N802
        return False

    def Init(self) -> None:  # noqa: N802
        self.initialized.add(self.here.rank)

    def Finalize(self) -> None:  # noqa: N802
        self.finalized.add(self.here.rank)

    def Get_rank(self) -> int:  # noqa: N802
        return self.here.rank

    def Get_size(self) -> int:  # noqa: N802
        return len(self.hosts)

    def Get_processor_name(self) -> str:  # noqa: N802
        return self.hosts[self.here.rank]

    def allgather(self, value: Any) -> list[Any]:
        self.slots[self.here.rank] = value
        self.gate.wait()
        values = list(self.slots)
        self.gate.wait()
        return values

    def bcast(self, value: Any, root: int) -> Any:
        return self.allgather(value)[root]

    def each(self, work: Callable[[int], Any]) -> list[Any]:
        """Return what `work(rank)` returns, or the LaunchError that it raises, of every rank."""
        results: list[Any] = [None] * len(self.hosts)

        def body(rank: int) -> None:
            self.here.rank = rank
            try:
                results[rank] = work(rank)
            except LaunchError as error:
                results[rank] = error

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(len(self.hosts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    for name in RANK_VARIABLES:  # what discovery has set itself
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]


@pytest.fixture
def mpi(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeMpi]:
    def install(*hosts: str) -> FakeMpi:
        made = FakeMpi(list(hosts))
        module = types.ModuleType("mpi4py")
        module.rc = types.SimpleNamespace(initialize=True, finalize=None)
        module.MPI = made
        monkeypatch.setitem(sys.modules, "mpi4py", module)
        return made

    return install


def discovered(made: FakeMpi, **variables: str) -> list[Any]:
    environment = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": str(len(made.hosts)), **variables}
    return made.each(lambda _: discovery.discover(environment))


@pytest.mark.skipif(not discovery._own_addresses({}), reason="no network interface but the loopback")
def test_ranks_of_two_hosts(mpi: Callable[..., FakeMpi]) -> None:
    made = mpi("n1", "n1", "n2", "n1", "n2")
    found = discovered(made)
    assert [one["RANK"] for one in found] == ["0", "1", "2", "3", "4"]
    assert {one["WORLD_SIZE"] for one in found} == {"5"}
    assert [one["LOCAL_RANK"] for one in found] == ["0", "1", "0", "2", "1"]
    assert [one["LOCAL_SIZE"] for one in found] == ["3", "3", "2", "3", "2"]
    (address,) = {one["MASTER_ADDR"] for one in found}
    assert not address.startswith("127.")  # other hosts reach rank 0 there
    (port,) = {one["MASTER_PORT"] for one in found}
    with socket.socket() as probe:
        probe.bind((address, int(port)))  # it is an address of this machine, and the port is free
    assert made.initialized == made.finalized == {0, 1, 2, 3, 4}
    assert sys.modules["mpi4py"].rc.initialize is False


def test_ranks_of_one_host_meet_on_the_loopback(mpi: Callable[..., FakeMpi]) -> None:
    assert {one["MASTER_ADDR"] for one in discovered(mpi("n1", "n1"))} == {"127.0.0.1"}


def test_a_port_of_the_recipe_is_kept(mpi: Callable[..., FakeMpi]) -> None:
    assert {one["MASTER_PORT"] for one in discovered(mpi("n1", "n1"), MASTER_PORT="29777")} == {"29777"}


def test_a_host_that_cannot_reach_rank_0_is_named_by_all(
    mpi: Callable[..., FakeMpi], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mpi("n1", "n2", "n3")
    monkeypatch.setattr(discovery, "_connects", lambda *_: made.here.rank != 2)
    monkeypatch.setattr(discovery, "_own_addresses", lambda _: ["10.0.0.1", "10.9.0.1"])
    for error in discovered(made):
        assert isinstance(error, LaunchError)
        assert "no address of n1 (10.0.0.1, 10.9.0.1) is reached by every rank, n3 reaches none" in str(error)
        assert "set launch.interface" in str(error)
    assert made.finalized == {0, 1, 2}


def test_the_first_address_that_everybody_reaches_is_taken(
    mpi: Callable[..., FakeMpi], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mpi("n1", "n2", "n3")
    monkeypatch.setattr(
        discovery, "_connects", lambda address, _: address == "10.9.0.1" or made.here.rank < 2
    )
    monkeypatch.setattr(discovery, "_own_addresses", lambda _: ["10.0.0.1", "10.9.0.1"])
    assert {one["MASTER_ADDR"] for one in discovered(made)} == {"10.9.0.1"}


def test_hosts_with_other_versions_are_named_by_all(
    mpi: Callable[..., FakeMpi], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mpi("n1", "n2", "n2")
    versions = {"cogview2": "1", "torch": "2.13", "deepspeed": "0.19.8", "python": "3.11"}
    monkeypatch.setattr(
        discovery,
        "package_versions",
        lambda: versions | ({"torch": "2.12"} if made.here.rank else {}),
    )
    for error in discovered(made):
        assert str(error).count("n2 has torch 2.12 where n1 has 2.13") == 1
        assert "install the same versions everywhere" in str(error)


def test_a_recipe_that_a_host_does_not_see_is_named(mpi: Callable[..., FakeMpi], tmp_path: Path) -> None:
    made = mpi("n1", "n2")
    shared = tmp_path / "shared.yaml"
    seen = {0: True, 1: False}

    def digest(path: Path) -> str:
        if not seen[made.here.rank]:
            raise FileNotFoundError(2, "No such file or directory")
        return "ab" * 32

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discovery, "sha256_file", digest)
        for error in made.each(lambda _: discovery.discover({"PMI_RANK": "0"}, shared)):
            assert f"n2 has {shared} No such file" in str(error)
            assert "keep the run on a file system that all hosts share" in str(error)


def test_two_different_mpis_are_told(mpi: Callable[..., FakeMpi]) -> None:
    made = mpi("n1")
    (error,) = made.each(lambda _: discovery.discover({"PMI_RANK": "1", "PMI_SIZE": "2"}))
    assert "mpirun started 2 ranks but the MPI library of mpi4py sees 1" in str(error)
    assert made.finalized == {0}


@pytest.mark.parametrize(
    "failure", [ImportError("No module named 'mpi4py'"), RuntimeError("cannot load MPI library")]
)
def test_no_mpi_library_is_one_sentence(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def find_spec(self, name: str, *_: object) -> None:
            if name.partition(".")[0] == "mpi4py":
                raise failure

    for name in [name for name in sys.modules if name.partition(".")[0] == "mpi4py"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(LaunchError) as caught:
        process.world_from_environment()
    assert f"mpi4py finds no MPI library ({failure})" in str(caught.value)
    assert "install Open MPI or MPICH on every host, or use --launcher hostfile" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_interface_of_the_recipe_gives_the_address() -> None:
    assert discovery._interface_address("lo") == "127.0.0.1"
    assert discovery._interface_address("no-such-if") is None
    assert discovery._own_addresses({"GLOO_SOCKET_IFNAME": "lo"}) == []  # of no use to other hosts
    assert all(not address.startswith("127.") for address in discovery._own_addresses({}))


# --- process.world_from_environment ---------------------------------------------------------------------------------


def test_variables_are_set_for_the_libraries(
    mpi: Callable[..., FakeMpi], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mpi("n1")
    monkeypatch.setenv("PMI_RANK", "0")
    (world,) = made.each(lambda _: process.world_from_environment(1))
    assert (world.rank, world.size, world.local_rank) == (0, 1, 0)
    assert (os.environ["RANK"], os.environ["MASTER_ADDR"]) == ("0", "127.0.0.1")


def test_ranks_of_a_launcher_need_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "PMI_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # our agents run under srun
    world = process.world_from_environment(2)
    assert (world.rank, world.size) == (1, 2)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"])
def test_two_slurm_tasks_without_ranks_do_not_train_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(
        LaunchError, match="Slurm started 2 tasks but no RANK is set, so each would train alone"
    ):
        process.world_from_environment()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert process.world_from_environment().size == 1


@pytest.mark.parametrize(("size", "expected"), [("2", 3), ("4", 2)])
def test_another_world_than_planned_is_refused(
    size: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(
        LaunchError, match=f"WORLD_SIZE is {size} but the job was planned for {expected} ranks"
    ):
        process.world_from_environment(expected)


def test_a_process_started_by_hand_is_alone() -> None:
    world = process.world_from_environment()
    assert (world.rank, world.size) == (0, 1)


def test_the_planned_ranks_are_those_of_the_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert process.planned_ranks(tmp_path) is None
    (tmp_path / "job.json").write_text('{"hosts": [{"name": "a", "slots": 2}, {"name": "b", "slots": 3}]}')
    assert process.planned_ranks(tmp_path) == 5
    (tmp_path / "job.json").write_text("[]")
    with pytest.raises(LaunchError, match="job.json cannot be read"):
        process.planned_ranks(tmp_path)
    assert process.claimed_rank() == 0
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert process.claimed_rank() == 3


def test_a_stage_that_may_not_run_leaves_its_reason(tmp_path: Path) -> None:
    """A whole stage process, as one of two tasks of a bare srun."""
    attempt = RunDirectory(tmp_path).stage("train_tokenizer").create().new_attempt()
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    words = ["-P", "-m", "cogview2.stages.train_tokenizer", "--run-dir", str(tmp_path), "--attempt", "1"]
    done = subprocess.run(
        [sys.executable, *words],
        env={**environment, "SLURM_STEP_NUM_TASKS": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("cogview2: Slurm started 2 tasks but no RANK is set")
    (outcome,) = attempt.outcomes()
    assert (outcome.rank, outcome.reason) == (0, "LaunchError")
