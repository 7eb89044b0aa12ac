"""`cogview2 submit --launcher hostfile` across hosts: the same training as on one machine; bad hosts told apart."""

import contextlib
from pathlib import Path

import pytest
import tiny_runs
from cluster_jobs import COGLM, Cluster, assert_same_training, run_of

import cogview2.pipeline.errors as errors

pytestmark = pytest.mark.cluster
# The pipelined configuration is partitioned: AdamW in place of Muon.
PIPE = (
    "coglm.train.deepspeed=coglm_tiny_pp",
    "coglm.train.pipeline_parallel=2",
    "coglm.train.optimizer.kind=adamw",
)


def _both(
    cluster: Cluster, finished: tiny_runs.Finished, name: str, slots: int, settings: tuple[str, ...]
) -> None:
    """Train once on two hosts and once on as many ranks of one; compare."""
    far = run_of(finished, cluster.runs, name)
    near = run_of(finished, cluster.runs, f"{name}-local")
    hosts = cluster.hosts_file(cluster.lan.nodes[:2], slots)
    cluster.finish(cluster.submit(name, hosts, settings=settings))
    local = cluster.arguments("run", f"{name}-local", "--stages", COGLM)
    sets = [word for setting in (*settings, f"launch.ranks={2 * slots}") for word in ("--set", setting)]
    cluster.lan.driver.run(*local, *sets, seconds=150.0)
    assert_same_training(far, near)
    outcomes = far.stage(COGLM).attempts()[-1].outcomes()
    where = {outcome.rank: outcome.host for outcome in outcomes}
    assert where == {rank: f"node{rank // slots + 1}" for rank in range(2 * slots)}
    assert not cluster.left_over(name)


def test_two_hosts_train_as_two_local_ranks(cluster: Cluster, prepared: tiny_runs.Finished) -> None:
    far = run_of(prepared, cluster.runs, "pair")
    hosts = cluster.lan.nodes[:2]
    with contextlib.ExitStack() as as_installed:
        # Debian's installer gives a host its own name at an address that no other host can use.
        for host in hosts:
            table = (cluster.lan.folder / "hosts").read_text().replace(f"{host.address} ", "127.0.1.1 ")
            as_installed.enter_context(host.replace(Path("/etc/hosts"), table))
        program = cluster.submit("pair", cluster.hosts_file(hosts), settings=("launch.interface=eth0",))
        cluster.finish(program)
    assert_same_training(far, prepared.run)
    assert not cluster.left_over("pair")


@pytest.mark.parametrize("settings", [(), PIPE], ids=["data parallel 4", "pipe 2 x data parallel 2"])
def test_two_ranks_on_each_host(
    cluster: Cluster, prepared: tiny_runs.Finished, settings: tuple[str, ...]
) -> None:
    _both(cluster, prepared, "pipes" if settings else "four", 2, settings)


def test_bad_hosts_are_told_apart_and_nothing_starts(cluster: Cluster, prepared: tiny_runs.Finished) -> None:
    run = run_of(prepared, cluster.runs, "refused")
    source = Path(errors.__file__)
    other, blind = cluster.lan.nodes[1:]
    hosts = cluster.hosts_file([*cluster.lan.nodes, "nobody"])
    with other.replace(source, source.read_text() + "\nOTHER = 1\n"), blind.hide(cluster.runs):
        printed = cluster.finish(cluster.submit("refused", hosts), code=errors.ExitCode.FAILED)
    said = {
        name: [line for line in printed.splitlines() if line.startswith(f"  {name}: ")]
        for name in ("node1", "node2", "node3", "nobody")
    }
    assert not said["node1"], printed
    assert any("unreachable" in line for line in said["nobody"]), printed
    assert any("another version of cogview2" in line for line in said["node2"]), printed
    assert any("does not see" in line for line in said["node3"]), printed
    assert not run.stage(COGLM).attempts() and not cluster.left_over("refused")


def test_a_host_without_network_is_unreachable(cluster: Cluster, prepared: tiny_runs.Finished) -> None:
    run = run_of(prepared, cluster.runs, "unplugged")
    unplugged = cluster.lan.nodes[1]
    unplugged.link("down")
    try:
        hosts = cluster.hosts_file(cluster.lan.nodes[:2])
        program = cluster.submit("unplugged", hosts, settings=("launch.ssh.connect_seconds=3",))
        printed = cluster.finish(program, code=errors.ExitCode.FAILED, seconds=30.0)
    finally:
        unplugged.link("up")
    assert "node2" in printed and "unreachable" in printed
    assert not run.stage(COGLM).attempts()
