"""A small cluster for each file of tests: hosts as namespaces, see tests/support/cluster_hosts.py."""

from collections.abc import Iterator
from pathlib import Path

import cluster_hosts
import cluster_slurm
import pytest
import tiny_runs
from cluster_jobs import COGLM, LONG, Cluster, run_of

from cogview2.pipeline.run_dir import RunDirectory

NODES = 3


@pytest.fixture(scope="session")
def possible() -> None:
    """Skips where hosts cannot be made."""
    reason = cluster_hosts.missing()
    if reason is not None:
        pytest.skip(f"no test cluster here: {reason}")


@pytest.fixture(scope="module")
def cluster(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A driver and three nodes; they end with the file of tests."""
    folder = tmp_path_factory.mktemp("cluster")
    with cluster_hosts.Lan(folder / "lan", NODES) as lan:
        yield Cluster(lan, folder / "shared")


@pytest.fixture(scope="module")
def slurm(cluster: Cluster) -> cluster_slurm.Slurm:
    """Slurm on the nodes of the cluster."""
    reason = cluster_slurm.missing()
    if reason is not None:
        pytest.skip(f"no Slurm here: {reason}")
    return cluster_slurm.Slurm(cluster.lan).start()


@pytest.fixture(scope="session")
def prepared(possible: None, tmp_path_factory: pytest.TempPathFactory) -> tiny_runs.Finished:
    """A tiny cascade up to a short training of CogLM, on two ranks of this machine."""
    arguments = [*tiny_runs.run_arguments(tmp_path_factory.mktemp("runs")), "--stages", f"..{COGLM}"]
    output = tiny_runs.command_line(*arguments).stdout
    return tiny_runs.Finished(
        RunDirectory(Path(arguments[arguments.index("--runs-dir") + 1]) / "tiny"), arguments, output
    )


@pytest.fixture(scope="session")
def straight(prepared: tiny_runs.Finished, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """What `LONG` gives on two ranks of this machine that nobody interrupts."""
    run = run_of(prepared, tmp_path_factory.mktemp("straight"), "tiny")
    tiny_runs.command_line(*tiny_runs.run_arguments(run.path.parent, *LONG), "--stages", COGLM)
    return run
