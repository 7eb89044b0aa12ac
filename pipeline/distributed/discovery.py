"""Who am I under mpirun: ranks, hosts and the meeting point, found out over MPI, which is then left for good.

MPI carries nothing of the training. It is finalized before any work starts, because an MPI program that leaves
without that is taken for a crash.
"""

import fcntl
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogview2.pipeline.errors import LaunchError
from cogview2.pipeline.fsops import sha256_file
from cogview2.pipeline.stage_dir import package_versions

RANK_NAMES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
"""Variables by which MPI launchers number their processes."""
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SAME_EVERYWHERE = ("cogview2", "torch", "deepspeed", "python")
_CONNECT_SECONDS = 5.0
_BACKLOG = 4096
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def started_by_mpi(environment: Mapping[str, str]) -> bool:
    """Return whether mpirun, or srun with an MPI plugin, started this process."""
    return any(name in environment for name in RANK_NAMES)


def refuse_lonely_tasks(environment: Mapping[str, str]) -> None:
    """Refuse to be one of several Slurm tasks that know nothing of each other.

    Each of them would train alone, in the same run directory.

    Raises:
        LaunchError: srun started more than one task, and nobody gave them ranks.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if tasks != "1":
        raise LaunchError(
            f"Slurm started {tasks} tasks but no RANK is set, so each would train alone; use cogview2 submit "
            "--launcher slurm, which starts one agent on each node"
        )


def discover(environment: Mapping[str, str], shared: Path | None = None) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT; every rank calls this at once.

    Args:
        environment: of this process; MASTER_PORT in it is kept, otherwise rank 0 takes a free port.
        shared: a file that all hosts must see with the same content, the run's recipe.

    Raises:
        LaunchError: no MPI library, mpirun and library do not fit together, hosts that differ or cannot reach rank 0.
    """
    library = _library()
    ours = not library.Is_initialized()
    if ours:
        library.Init()
    try:
        return _discover(library, environment, shared)
    finally:
        if ours:
            library.Finalize()


def _library() -> Any:
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise LaunchError(
            f"mpirun started this process but mpi4py finds no MPI library ({reason}); install Open MPI or MPICH on every "
            "host, or use --launcher hostfile, which needs none"
        ) from error
    return MPI


def _discover(library: Any, environment: Mapping[str, str], shared: Path | None) -> dict[str, str]:
    world = library.COMM_WORLD
    rank, size = int(world.Get_rank()), int(world.Get_size())
    said = next((environment[name] for name in _SIZES if name in environment), None)
    if said is not None and said != str(size):
        raise LaunchError(
            f"mpirun started {said} ranks but the MPI library of mpi4py sees {size}: they are two different MPIs; put the "
            "mpirun of the library on the PATH, or set MPI4PY_LIBMPI to the library of mpirun"
        )
    hosts: list[str] = world.allgather(library.Get_processor_name())
    _refuse_differing(hosts, world.allgather(_facts(shared)))
    local = [index for index, host in enumerate(hosts) if host == hosts[rank]]
    address, port = _meeting_point(world, rank, hosts, environment)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local.index(rank)),
        "LOCAL_SIZE": str(len(local)),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def _meeting_point(
    world: Any, rank: int, hosts: Sequence[str], environment: Mapping[str, str]
) -> tuple[str, str]:
    """Return an address of rank 0 that every host has just reached, and a port that is free there."""
    alone = len(set(hosts)) == 1
    with socket.socket() as listener:
        mine = None
        if rank == 0:
            listener.bind(("", 0))
            listener.listen(_BACKLOG)  # nobody is let in: a connection that waits to be is proof enough
            port = environment.get("MASTER_PORT") or str(_free_port())
            loopback = ["127.0.0.1"] if alone else []
            mine = ([*loopback, *_own_addresses(environment)], listener.getsockname()[1], port)
        candidates, open_port, port = world.bcast(mine, root=0)
        dials = alone or hosts.index(hosts[rank]) == rank  # one rank of each host is enough
        reached = world.allgather([not dials or _connects(address, open_port) for address in candidates])
    return _agreed(candidates, reached, hosts), port


def _facts(shared: Path | None) -> dict[str, str]:
    versions = package_versions()
    facts = {name: versions.get(name, "not installed") for name in _SAME_EVERYWHERE}
    if shared is not None:
        try:
            facts[str(shared)] = sha256_file(shared)
        except OSError as error:
            facts[str(shared)] = error.strerror or "unreadable"
    return facts


def _refuse_differing(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> None:
    """Compare every rank with rank 0; all ranks see the same lists, so all of them say the same."""
    found = {
        f"{host} has {name} {fact[name][:12]} where {hosts[0]} has {facts[0][name][:12]}"
        for host, fact in zip(hosts, facts, strict=True)
        for name in fact
        if fact[name] != facts[0][name]
    }
    if found:
        raise LaunchError(
            f"the hosts of this job differ: {'; '.join(sorted(found))}; install the same versions everywhere and keep the "
            "run on a file system that all hosts share"
        )


def _agreed(candidates: Sequence[str], reached: Sequence[Sequence[bool]], hosts: Sequence[str]) -> str:
    """Return the first address of rank 0 on which every rank reached it."""
    for index, address in enumerate(candidates):
        if all(answers[index] for answers in reached):
            return address
    cut_off = sorted({host for host, answers in zip(hosts, reached, strict=True) if not any(answers)})
    raise LaunchError(
        f"no address of {hosts[0]} ({', '.join(candidates) or 'it has none'}) is reached by every rank, "
        f"{', '.join(cut_off) or 'no host'} reaches none of them; set launch.interface to the network between the hosts"
    )


def _own_addresses(environment: Mapping[str, str]) -> list[str]:
    """Return the IPv4 addresses of this host, the most wanted first: of the interface asked for, or all by name."""
    named = next((environment[name] for name in _INTERFACES if name in environment), None)
    if named is not None:
        found = [_interface_address(named)]
    else:
        found = [_interface_address(name) for _, name in socket.if_nameindex()]
    return [address for address in dict.fromkeys(found) if address and not address.startswith("127.")]


def _interface_address(name: str) -> str | None:
    request = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:  # no such interface, or none with an IPv4 address
            return None


def _connects(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_SECONDS):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
