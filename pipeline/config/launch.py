"""Where and how jobs run: nothing here changes what is computed, so it is in no fingerprint."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from cogview2.pipeline.config.base import Config
from cogview2.pipeline.config.hardware import hardware_table

Positive = Annotated[int, Field(ge=1)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:@+=-]{0,127}$")]
"""One word that no shell and no scheduler reads as anything else."""
VariableName = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]{0,63}$")]


class SshConfig(Config):
    """How `submit --launcher hostfile` reaches the hosts."""

    user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")] | None = None
    """By default what ssh's own configuration says."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    connect_seconds: Positive = 10
    """Limit for one connection; all hosts are tried at once."""


class SlurmConfig(Config):
    """What sbatch is told (`submit --launcher slurm`)."""

    nodes: Positive = 1
    time: Annotated[str, Field(pattern=r"^(\d{1,3}-)?\d{1,2}:\d{2}:\d{2}$")] = "24:00:00"
    """Limit of one job; a stage that needs longer is requeued and goes on from its checkpoint."""
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    gpus: bool = True
    """Ask for `launch.ranks_per_node` GPUs on each node; false on nodes without any."""
    signal_seconds: Annotated[int, Field(ge=30)] = 600
    """How long before the limit the job is told to save and leave."""
    max_requeues: Annotated[int, Field(ge=0)] = 100
    extra: tuple[Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[A-Za-z0-9_.,:@+/=-]+)?$")], ...] = ()
    """Further options, for example `--exclusive` or `--gres=gpu:8`."""

    @model_validator(mode="after")
    def _time_to_work(self) -> "SlurmConfig":
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        limit = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
        if limit <= self.signal_seconds:
            raise ValueError(
                f"slurm.signal_seconds {self.signal_seconds} leaves nothing of slurm.time {self.time}: the job would be "
                "told to stop as soon as it starts; use a longer time, or fewer seconds"
            )
        return self


Patience = Annotated[float, Field(ge=0)]


class WatchdogConfig(Config):
    """After how many seconds without progress a rank counts as hung; 0: never. Then the job ends with exit code 76."""

    step_seconds: Patience = 600
    """For one step of training, or for reading its batch."""
    save_seconds: Patience = 1800
    """For saving a checkpoint, or for the next token of a picture drawn on the way."""
    start_seconds: Patience = 1800
    """For the start: until all ranks have met, the checkpoint is read, and the first step (kernels are compiled) is done."""
    work_seconds: Patience = 1800
    """For one piece of work where nothing is trained: a batch of pictures, a run of a model that draws."""

    @property
    def longest(self) -> float:
        """The most patience of all phases, in seconds."""
        return max(self.step_seconds, self.save_seconds, self.start_seconds, self.work_seconds)


class LaunchConfig(Config):
    """The shape of a job, and what reaches its ranks."""

    ranks: Positive = 2
    """Processes of a job on this machine (`cogview2 run`); on a cluster the host list decides."""
    ranks_per_node: Positive = 8
    """Processes of each node under Slurm and mpirun; a hostfile says it host by host (slots=N)."""
    threads_per_rank: Positive = 1
    """CPU threads of each process."""
    environment: dict[VariableName, str] = {}
    """Variables set for every rank, for example NCCL_IB_HCA. Nothing else of the submitting shell reaches other hosts."""
    interface: Word | None = None
    """Network interface between hosts (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); by default the libraries choose."""
    master_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """By default a port that is free on the first host."""
    grace_seconds: Positive = 120
    """How long ranks may take to save once a job is told to stop."""
    watchdog: WatchdogConfig = WatchdogConfig()
    hardware: Word | None = None
    """Name in the hardware table (`cogview2 plan --list-hardware`), for plans and utilisation; by default the GPU's own."""
    ssh: SshConfig = SshConfig()
    slurm: SlurmConfig = SlurmConfig()

    @field_validator("hardware")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in hardware_table():
            raise ValueError(f"hardware {name} is not in the table; use one of {', '.join(hardware_table())}")
        return name
