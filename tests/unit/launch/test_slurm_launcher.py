"""Inside a Slurm allocation: the nodes, what is asked of them, and the one srun that starts the agents."""

import functools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_programs import program

from cogview2.launch import launchers
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import LaunchError
from cogview2.pipeline.run_dir import RunDirectory

SLURM = ["launch.slurm.nodes=2", "launch.ranks_per_node=4", "launch.threads_per_rank=3"]


@functools.cache
def recipe(*overrides: str) -> Recipe:
    return load_recipe("quickstart", [*SLURM, *overrides])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "quickstart").create(recipe())


@pytest.fixture
def allocation(binaries: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program(binaries, "scontrol", '[ "$1 $2 $3" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"')
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_JOB_ID", "12345")
    return binaries


def test_one_srun_starts_an_agent_on_every_node(allocation: Path) -> None:
    launcher = launchers.make("slurm")
    chosen = recipe("launch.slurm.gpus=false", 'launch.environment={"A_VALUE": "$(touch x)"}')
    spec = launchers.job_spec(launcher, chosen, Path("/r/q"), "pretrain_coglm", 3)
    assert [(host.name, host.slots) for host in spec.hosts] == [("n1", 4), ("n2", 4)]
    (command,) = launcher.commands(spec)
    assert command.argv == (
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=12"),
        *("--kill-on-bad-exit=0", "--mpi=none", "--export=ALL", sys.executable, "-P", "-m"),
        *("cogview2.launch.agent", "--job", "/r/q/stages/pretrain_coglm/attempts/0003/job.json"),
        *("--node-rank", "slurm"),
    )
    assert command.stop == "SIGUSR1"
    assert "A_VALUE" not in command.environment  # job.json carries it
    assert (spec.master_addr, spec.master_port) == ("n1", 20_000 + 12345 % 12_000)
    assert spec.environment["DS_ACCELERATOR"] == "cpu"


NODE = """import sys
from cogview2.launch import probe
probe.socket.gethostname = lambda: "{name}.cluster"
probe._address_of = lambda name: "10.0.0.1"
{change}
probe.main(sys.argv[5:])"""


def nodes(folder: Path, **changes: str) -> None:
    """A srun that runs the probe as two nodes do."""
    for name in ("n1", "n2"):
        (folder / f"{name}.py").write_text(NODE.format(name=name, change=changes.get(name, "")))
    text = f"""while [[ "$1" == --* ]]; do shift; done; python="$1"
for name in n1 n2; do "$python" -P {folder}/$name.py "$@" & done; wait"""
    program(folder, "srun", text)


def test_nodes_that_can_run_the_job(allocation: Path, run: RunDirectory) -> None:
    nodes(allocation)
    launchers.make("slurm").check(run, recipe("launch.slurm.gpus=false"))
    assert not list(run.path.glob(".probe-*"))


def test_bad_nodes_are_told_apart(allocation: Path, run: RunDirectory) -> None:
    other = 'probe.versions = lambda: {"python": "3.9", "cogview2": "0.1.0", "torch": "2", "deepspeed": "1"}'
    nodes(allocation, n1=other, n2="sys.exit(1)")
    with pytest.raises(LaunchError) as caught:
        launchers.make("slurm").check(run, recipe())
    first, one, two = str(caught.value).splitlines()
    assert first == "2 of 2 nodes cannot run this job, nothing was started:"
    assert one.startswith("  n1: has python 3.9 where this machine has ")
    assert "has 0 GPUs for slots=4" in one
    assert two == "  n2: gave no answer to srun (no message); look at it with sinfo"
    nodes(allocation, n2="probe.token_path = lambda run, token: run / 'gone'")
    with pytest.raises(LaunchError, match=f"n2: does not see {run.path}") as caught:
        launchers.make("slurm").check(run, recipe("launch.slurm.gpus=false"))
    assert "n1" not in str(caught.value)


def test_the_recipes_port_wins(allocation: Path) -> None:
    assert launchers.make("slurm").rendezvous(recipe("launch.master_port=29999")) == ("n1", 29999)


@pytest.mark.parametrize("printed", ["", "n1\\n-oProxyCommand=x\\n", "n1 n2\\n", "n1\\n\\n", "n1\\nn1\\n"])
def test_what_scontrol_prints_is_read_strictly(allocation: Path, printed: str) -> None:
    program(allocation, "scontrol", f"printf '{printed}'")
    with pytest.raises(LaunchError, match="not one host name a line; look at the job with squeue"):
        launchers.make("slurm").hosts(recipe())


def test_outside_an_allocation_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, binaries: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(LaunchError, match="use cogview2 submit --launcher slurm"):
        launchers.make("slurm").hosts(recipe())
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    program(binaries, "scontrol", "echo 'scontrol: error: gone' >&2; exit 1")
    with pytest.raises(LaunchError, match="scontrol cannot list the nodes of n1: scontrol: error: gone"):
        launchers.make("slurm").hosts(recipe())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="srun is not on the PATH"):
        launchers.make("slurm").check(RunDirectory(Path("/r/q")), recipe())


@pytest.mark.parametrize(
    ("overrides", "cpu"),
    [
        ([], False),
        (["launch.slurm.gpus=false"], True),
        (["launch.slurm.gpus=false", 'launch.slurm.extra=["--gres=gpu:4"]'], False),
        (['launch.environment={"DS_ACCELERATOR": "cpu"}'], True),
    ],
)
def test_what_the_job_asks_for_decides_between_cpu_and_gpu(overrides: list[str], cpu: bool) -> None:
    assert launchers.make("slurm").uses_cpu(recipe(*overrides)) is cpu


def test_the_printed_srun_line_is_a_shell_line(allocation: Path) -> None:
    launcher = launchers.make("slurm")
    spec = launchers.job_spec(launcher, recipe(), Path("/r/it's q"), "evaluate", 1)
    (command,) = launcher.commands(spec)
    echoed = subprocess.run(
        [
            "bash",
            "-c",
            f"{sys.executable} -c 'import json,sys; print(json.dumps(sys.argv[1:]))' {shlex.join(command.argv)}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(echoed.stdout) == list(command.argv)
