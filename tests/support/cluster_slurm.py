"""A Slurm of our own on the hosts of a `Lan`: munge and the controller on the driver, one daemon on each node."""

import shutil
from pathlib import Path

from cluster_hosts import Host, Lan, wait_for

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
"""What must be installed: Debian's slurm-wlm and munge."""
_CONFIGURED = Path("/etc/slurm")
# No cgroups and no accounting: nodes of this Slurm are groups of processes on one machine.
_SETTINGS = """
ClusterName=tiny
SlurmctldHost=driver({driver})
AuthType=auth/munge
AuthInfo=socket={folder}/socket/munge
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
KillWait=5
SlurmdParameters=config_overrides
"""
_NODE = "NodeName={name} NodeAddr={address} CPUs=4 RealMemory=4000 State=UNKNOWN\n"


def missing() -> str | None:
    """Return why there can be no Slurm here, in a few words; None where it can be."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


class Slurm:
    """The daemons; commands of Slurm work on every host while they run. They end with their hosts."""

    def __init__(self, lan: Lan) -> None:
        self.lan = lan
        self.folder = lan.folder / "slurm"

    @property
    def _files(self) -> tuple[str, str]:
        return (str(self.folder / "etc"), str(_CONFIGURED))

    def start(self) -> "Slurm":
        """Start all daemons; every node is idle when this returns."""
        for name in ("etc", "key", "socket", "state"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "key").chmod(0o700)
        settings = _SETTINGS.format(driver=self.lan.driver.address, folder=self.folder)
        nodes = [_NODE.format(name=node.name, address=node.address) for node in self.lan.nodes]
        names = ",".join(node.name for node in self.lan.nodes)
        part = f"PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP\n"
        (self.folder / "etc" / "slurm.conf").write_text(settings + "".join(nodes) + part)
        for host in self.lan.hosts:
            host.run("mount", "--bind", *self._files)
        self._munge(self.lan.driver)
        self.lan.driver.run("slurmctld")
        for node in self.lan.nodes:
            node.run("slurmd", "-N", node.name)
        wait_for(lambda: self.states() == {node.name: "idle" for node in self.lan.nodes}, "idle nodes")
        return self

    def _munge(self, host: Host) -> None:
        """One munged for all: its socket is a file, and files are shared."""
        key = self.folder / "key" / "munge.key"
        host.run("dd", "if=/dev/urandom", f"of={key}", "bs=1024", "count=1")
        key.chmod(0o600)
        places = {"key-file": key, "socket": self.folder / "socket" / "munge"}
        places |= {f"{name}-file": self.folder / "key" / f"munged.{name}" for name in ("pid", "log", "seed")}
        host.run("munged", "--force", *(f"--{name}={path}" for name, path in places.items()))

    def states(self) -> dict[str, str]:
        """Return node -> state as Slurm says."""
        words = self.lan.driver.run(
            "sinfo", "--noheader", "--Node", "--format=%N %T", check=False
        ).stdout.split()
        return dict(zip(words[::2], words[1::2], strict=True))

    def jobs(self) -> dict[int, tuple[str, str]]:
        """Return number -> (state, reason) of every job that the controller still knows, ended ones too."""
        rows = self.lan.driver.run(
            "squeue", "--noheader", "--states=all", "--format=%i %T %r"
        ).stdout.splitlines()
        return {int(row.split()[0]): (row.split()[1], " ".join(row.split()[2:])) for row in rows}

    def wait_until(self, jobs: dict[int, str], seconds: float = 300.0) -> None:
        """Wait until jobs have these states.

        Raises:
            AssertionError: they have not within the limit; shows what they are.
        """

        def now() -> dict[int, str]:
            known = self.jobs()
            return {job: known[job][0] for job in jobs}

        try:
            wait_for(lambda: now() == jobs, "states of the jobs", seconds, every=1.0)
        except AssertionError as error:
            raise AssertionError(f"{error}: jobs are {now()}, not {jobs}") from error

    def begin_soon(self, job: int) -> None:
        """Start a requeued job without the two minutes that Slurm lets pass.

        Not at once: a node refuses a job that starts in the second in which it ended there.
        """
        self.lan.driver.run("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
