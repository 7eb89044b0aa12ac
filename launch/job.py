"""One job of one stage, described once; every launcher renders the same description (docs/operations.md)."""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import LaunchError

MAX_SLOTS = 1024
PRIVATE_MODE = 0o600
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_STAGE = re.compile(r"[a-z][a-z0-9_]{0,63}")


def is_host_name(text: str) -> bool:
    """Return whether `text` is a host name or an IPv4 address that ssh and no shell reads as anything else."""
    return _HOST_NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class Host:
    """One machine and how many ranks it gets."""

    name: str
    slots: int

    def __post_init__(self) -> None:
        if not is_host_name(self.name):
            raise LaunchError(
                f"{self.name!r} is no host name; use letters, digits, dots and hyphens, a letter or digit first"
            )
        if not 1 <= self.slots <= MAX_SLOTS:
            raise LaunchError(f"host {self.name}: slots={self.slots}; use 1 to {MAX_SLOTS}")


@dataclass(frozen=True)
class JobSpec:
    """What is to be started: the same for every launcher.

    `environment` is all that is set for the ranks on top of what their host gives them; `run` and `python` are paths
    that every host sees under the same name. `master_port` 0 means that it is not chosen yet (a dry run).
    """

    stage: str
    run: Path
    attempt: int
    hosts: tuple[Host, ...]
    master_addr: str
    master_port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable
    grace_seconds: float = 120.0

    @property
    def ranks(self) -> int:
        """All ranks of the job."""
        return sum(host.slots for host in self.hosts)

    @property
    def folder(self) -> Path:
        """RUN/stages/STAGE/attempts/NNNN, where the job's records and logs are."""
        return self.run / "stages" / self.stage / "attempts" / f"{self.attempt:04d}"

    @property
    def file(self) -> Path:
        """job.json: this description, for the agents on the hosts; readable by its owner only."""
        return self.folder / "job.json"

    @property
    def hostfile(self) -> Path:
        """The hosts in DeepSpeed's format, made from `hosts`."""
        return self.folder / "hostfile"

    @property
    def port_text(self) -> str:
        """The port for a command line; before it is chosen, words that say where it will come from."""
        return str(self.master_port) if self.master_port else f"<free port of {self.hosts[0].name}>"

    def ranks_of(self, node_rank: int) -> range:
        """Return the ranks of one host, in DeepSpeed's order: hosts one after the other."""
        first = sum(host.slots for host in self.hosts[:node_rank])
        return range(first, first + self.hosts[node_rank].slots)

    def host_of(self, rank: int) -> str:
        """Return the name of the host of a rank; raises LaunchError for a rank that the job does not have."""
        for index, host in enumerate(self.hosts):
            if rank in self.ranks_of(index):
                return host.name
        raise LaunchError(f"the job has ranks 0 to {self.ranks - 1}, not {rank}; see {self.file}")

    def stage_words(self) -> list[str]:
        """Return what follows DeepSpeed's own options: the module and what it is told."""
        module = f"cogview2.stages.{self.stage}"
        return ["--module", module, "--run-dir", str(self.run), "--attempt", str(self.attempt)]

    def runner_argv(self, node_rank: int) -> list[str]:
        """Return the DeepSpeed command that a host's agent starts: the ranks of that host, nothing over ssh."""
        return [
            *(self.python, "-m", "deepspeed.launcher.runner"),
            *("--hostfile", str(self.hostfile), "--no_ssh", "--node_rank", str(node_rank)),
            *("--master_addr", self.master_addr, "--master_port", self.port_text, "--no_local_rank"),
            *self.stage_words(),
        ]

    def agent_argv(self, node_rank: int | str) -> list[str]:
        """Return the command that a launcher starts on a host; `slurm` takes the node rank from SLURM_NODEID."""
        agent = (self.python, "-P", "-m", "cogview2.launch.agent")
        return [*agent, "--job", str(self.file), "--node-rank", str(node_rank)]

    def write(self) -> None:
        """Write job.json and the hostfile into the attempt's folder, which must exist.

        Raises:
            RunDirectoryError: they cannot be written.
        """
        content = {
            "stage": self.stage,
            "run": str(self.run),
            "attempt": self.attempt,
            "hosts": [{"name": host.name, "slots": host.slots} for host in self.hosts],
            "master_addr": self.master_addr,
            "master_port": self.master_port,
            "environment": dict(sorted(self.environment.items())),
            "python": self.python,
            "grace_seconds": self.grace_seconds,
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        fsops.write_text(self.file, text + "\n", mode=PRIVATE_MODE)
        lines = [f"{host.name} slots={host.slots}\n" for host in self.hosts]
        fsops.write_text(self.hostfile, "".join(lines))

    @classmethod
    def read(cls, path: Path) -> "JobSpec":
        """Return the description in a job.json.

        Raises:
            LaunchError: missing, damaged, or with a value that no launcher writes.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            spec = cls._checked(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise LaunchError(
                f"cannot read the job {path} on this host ({reason}); the run directory must be on a file system "
                "that all hosts share"
            ) from error
        if spec.file != path:
            raise LaunchError(f"{path} describes the job of {spec.folder}; start it with cogview2 submit")
        return spec

    @classmethod
    def _checked(cls, content: dict[str, Any]) -> "JobSpec":
        hosts = tuple(Host(str(entry["name"]), int(entry["slots"])) for entry in content["hosts"])
        environment = {str(name): str(value) for name, value in content["environment"].items()}
        bad = [name for name, value in environment.items() if not _VARIABLE.fullmatch(name) or "\0" in value]
        if bad:
            raise ValueError(f"{bad[0]!r} cannot be set as a variable")
        if not hosts or not _STAGE.fullmatch(content["stage"]):
            raise ValueError("it names no hosts or no stage")
        return cls(
            stage=content["stage"],
            run=Path(content["run"]),
            attempt=int(content["attempt"]),
            hosts=hosts,
            master_addr=str(content["master_addr"]),
            master_port=int(content["master_port"]),
            environment=environment,
            python=str(content["python"]),
            grace_seconds=float(content["grace_seconds"]),
        )


@dataclass(frozen=True)
class Command:
    """One process that a launcher starts on this machine; a dry run prints it, a real run starts exactly it."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    """The whole environment of the process."""
    label: str
    """For people: the host, or the launcher."""
    stop: Literal["ranks", "stdin", "SIGUSR1"]
    """How its ranks are asked to save and leave: SIGTERM to their process ids here; the line `stop` on its standard input
    (host agents; end of file means the same); or SIGUSR1 to the process itself, which hands it on (srun, mpirun)."""
