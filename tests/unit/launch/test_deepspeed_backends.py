"""DeepSpeed's own launchers: what is rendered, what is refused, and that the abort path of pdsh cannot reach strangers."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_programs import FakePrograms

from cogview2.launch import launchers, stop_ranks
from cogview2.launch.deepspeed_backends import BackendLauncher, refuse_unsafe
from cogview2.launch.job import Host, JobSpec
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.errors import LaunchError

BACKENDS = ("pdsh", "openmpi", "mpich")
RUNNER = "cogview2.stages.commands.deepspeed_runner"


def spec(run: Path, environment: dict[str, str] | None = None, **changes: object) -> JobSpec:
    values: dict = {
        "stage": "pretrain_coglm",
        "run": run,
        "attempt": 1,
        "hosts": (Host("a", 2), Host("b", 2)),
        "master_addr": "a",
        "master_port": 29555,
        "environment": environment or {"OMP_NUM_THREADS": "1"},
    }
    return JobSpec(**(values | changes))


def launcher(name: str, folder: Path, *overrides: str) -> BackendLauncher:
    (folder / "hosts").write_text("a slots=2\nb slots=2\n")
    made = launchers.make(name, folder / "hosts")
    made._launch = load_recipe("quickstart", list(overrides)).launch
    return made


@pytest.mark.parametrize("name", BACKENDS)
def test_one_runner_is_rendered(tmp_path: Path, name: str) -> None:
    (command,) = launcher(name, tmp_path).commands(spec(Path("/r/q")))
    words = list(command.argv)
    assert words[:6] == [sys.executable, "-P", "-m", RUNNER, "--export", "OMP_NUM_THREADS"]
    assert words[words.index("--launcher") + 1] == name
    assert words[words.index("--hostfile") + 1] == "/r/q/stages/pretrain_coglm/attempts/0001/hostfile"
    assert words[-6:] == [
        *("--module", "cogview2.stages.pretrain_coglm", "--run-dir", "/r/q", "--attempt", "1"),
    ]
    assert {"--force_multi", "--no_ssh_check", "--no_local_rank"} <= set(words)
    assert command.stop == "SIGUSR1"


def test_user_port_and_interface_reach_each_backend(tmp_path: Path) -> None:
    overrides = ["launch.ssh.user=ann", "launch.ssh.port=2222", "launch.interface=ib0"]
    (pdsh,) = launcher("pdsh", tmp_path, *overrides).commands(spec(Path("/r/q")))
    assert pdsh.environment["PDSH_SSH_ARGS_APPEND"].endswith("-o BatchMode=yes -l ann -p 2222")
    (openmpi,) = launcher("openmpi", tmp_path, *overrides).commands(spec(Path("/r/q")))
    text = next(word for word in openmpi.argv if word.startswith("--launcher_args="))
    assert shlex.split(text.partition("=")[2]) == [
        *("--map-by", "slot", "--bind-to", "none", "--mca", "plm_rsh_args", "-l ann -p 2222"),
        *("--mca", "oob_tcp_if_include", "ib0", "--mca", "btl_tcp_if_include", "ib0"),
    ]
    (mpich,) = launcher("mpich", tmp_path, *overrides).commands(spec(Path("/r/q")))
    assert mpich.environment["HYDRA_LAUNCHER_EXTRA_ARGS"] == "-l ann -p 2222"
    assert "--launcher_args=-bind-to none -iface ib0" in mpich.argv


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"environment": {"A": "two words"}}, "the variable A is 'two words', but DeepSpeed's"),
        ({"environment": {"A": "$(touch x)"}}, "or --launcher hostfile, which quotes"),
        ({"environment": {"A": "%n"}}, "the variable A is '%n'"),
        ({"environment": {"HUB_TOKEN": "abc"}}, "launch.environment.HUB_TOKEN looks like a secret"),
        ({"run": Path("/r/my run")}, "the run directory is '/r/my run'"),
        ({"run": Path("/r/ü")}, "the run directory is"),
        ({"python": "/opt/my env/python"}, "Python is '/opt/my env/python'"),
    ],
)
def test_what_is_not_plain_is_refused_in_one_sentence(name: str, change: dict, words: str) -> None:
    with pytest.raises(LaunchError) as caught:
        refuse_unsafe(spec(**({"run": Path("/r/q")} | change)), name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_variables_of_every_job_are_plain() -> None:
    launch = load_recipe("quickstart", ["launch.interface=ib0"]).launch
    for name in BACKENDS:
        refuse_unsafe(spec(Path("/r/q"), launchers.variables(launch, cpu=True)), name)


def test_mpich_needs_equal_hosts() -> None:
    uneven = spec(Path("/r/q"), hosts=(Host("a", 2), Host("b", 1)))
    refuse_unsafe(uneven, "openmpi")
    with pytest.raises(LaunchError, match="the same slots on every host, not a 2, b 1; use --launcher mpi"):
        refuse_unsafe(uneven, "mpich")


def test_missing_and_wrong_programs_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("quickstart", [])
    run = SimpleNamespace(path=tmp_path)
    fakes = FakePrograms(tmp_path / "fakes")
    monkeypatch.setenv("PATH", fakes.variables["PATH"])
    monkeypatch.setenv("FAKES", fakes.variables["FAKES"])
    with pytest.raises(
        LaunchError, match="the mpirun on the PATH is Open MPI's, not that of --launcher mpich"
    ):
        launcher("mpich", tmp_path).check(run, recipe)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="pdsh is not on the PATH"):
        launcher("pdsh", tmp_path).check(run, recipe)
    with pytest.raises(LaunchError, match="mpirun is not on the PATH"):
        launcher("openmpi", tmp_path).check(run, recipe)


# --- the real classes of DeepSpeed, changed ---------------------------------------------------------------------------

ASK = """
import json, os, signal, sys
from pathlib import Path
from cogview2.stages.commands import deepspeed_runner
from deepspeed.launcher import runner, multinode_runner
class Pool(dict): pass
def ask(kind, words, exports):
    arguments = runner.parse_args(words)
    pool = runner.fetch_hostfile(arguments.hostfile)
    maker = getattr(multinode_runner, kind)
    made = maker(arguments, "WORLD") if kind == "PDSHRunner" else maker(arguments, "WORLD", pool)
    for name, value in exports.items():
        made.add_export(name, value)
    return made.get_cmd(dict(os.environ), {host: list(range(n)) for host, n in pool.items()})
deepspeed_runner.disarm(["OMP_NUM_THREADS", "EMPTY"])
answers = {}
for kind, words, exports in json.loads(sys.argv[1]):
    try:
        answer = ask(kind, words, exports)
        answers[kind] = answer[:2] if kind == "PDSHRunner" else answer
    except Exception as error:
        answers[kind + " refused"] = str(error)
answers["paths"] = runner.DEEPSPEED_ENVIRONMENT_PATHS
print("ANSWER" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What DeepSpeed's classes build after `disarm`; one start of Python for all of them."""
    folder = tmp_path_factory.mktemp("asked")
    job = spec(folder, {"EMPTY": "", "OMP_NUM_THREADS": "1"})
    job.folder.mkdir(parents=True)
    job.write()
    questions = []
    for kind, name in (("PDSHRunner", "pdsh"), ("OpenMPIRunner", "openmpi"), ("MPICHRunner", "mpich")):
        (command,) = launcher(name, folder).commands(job)
        exports = {"OMP_NUM_THREADS": "1", "EMPTY": "", "PYTHONPATH": "/x", "NCCL_EVIL": "$(touch x)"}
        questions.append((kind, list(command.argv[6:]), exports))
    questions.append(("SlurmRunner", questions[0][1], {"OMP_NUM_THREADS": "$(touch x)"}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    words = [sys.executable, "-c", ASK, json.dumps(questions)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "ANSWER" in done.stdout, done.stderr
    return {"folder": folder, **json.loads(done.stdout.partition("ANSWER")[2])}


def test_the_kill_command_of_pdsh_names_the_ranks_of_one_attempt(answers: dict) -> None:
    command, kill = answers["PDSHRunner"]
    assert command[:6] == ["pdsh", "-S", "-f", "1024", "-w", "a,b"]
    assert "pkill" not in " ".join(kill)
    assert kill[:6] == command[:6]
    assert shlex.split(kill[6]) == stop_ranks.words(
        sys.executable, answers["folder"], "pretrain_coglm", 1, kill=True
    )


def test_exactly_the_variables_asked_for_are_exported(answers: dict) -> None:
    command, _ = answers["PDSHRunner"]
    assert command[6] == "export OMP_NUM_THREADS=1; export EMPTY=; "
    openmpi = answers["OpenMPIRunner"]
    exported = [openmpi[k + 1] for k, word in enumerate(openmpi) if word == "-x"]
    assert sorted(exported) == ["EMPTY=", "OMP_NUM_THREADS=1", "UCX_TLS=tcp"]
    mpich = answers["MPICHRunner"]
    exported = [mpich[k + 1] for k, word in enumerate(mpich) if word == "-genv" and "=" in mpich[k + 1]]
    assert sorted(exported) == ["EMPTY=", "OMP_NUM_THREADS=1"]
    assert answers["paths"] == []


def test_a_value_that_is_not_plain_is_refused_in_the_runner_too(answers: dict) -> None:
    assert "OMP_NUM_THREADS is '$(touch x)'" in answers["SlurmRunner refused"]


def test_open_mpi_is_not_bound_to_eth0(answers: dict) -> None:
    assert "eth0" not in " ".join(answers["OpenMPIRunner"])
    assert "--bind-to none" in " ".join(answers["OpenMPIRunner"])


def test_mpichs_ranks_are_our_module_itself(answers: dict) -> None:
    command = answers["MPICHRunner"]
    assert "launcher_helper" not in " ".join(command)
    at = command.index("-u")
    assert command[at:] == [
        *("-u", "-m", "cogview2.stages.pretrain_coglm", "--run-dir", str(answers["folder"]), "--attempt", "1")
    ]


# --- the runner itself, over a fake pdsh ------------------------------------------------------------------------------

LAUNCH = """
import argparse, json, os, pathlib, subprocess, sys
asked, words = argparse.Namespace(), sys.argv[1:]
node = int(next(word for word in words if word.startswith("--node_rank=")).partition("=")[2])
folder = pathlib.Path(os.environ["FAKES"])
tail = words[-5:]
environment = dict(os.environ, RANK=str(node))
rank = subprocess.Popen([sys.executable, str(folder / "rank.py"), *tail], env=environment)
sys.exit(abs(rank.wait()))
"""
RANK = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["FAKES"])
rank = int(os.environ["RANK"])
attempt = pathlib.Path(sys.argv[3]) / "stages/pretrain_coglm/attempts/0001"
def leave(number, frame):
    (folder / f"told-{rank}").write_text(signal.Signals(number).name)
    os._exit(75)
signal.signal(signal.SIGTERM, leave)
(folder / f"rank-{rank}.json").write_text(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))
(attempt / f"rank-{rank}.pid").write_text(str(os.getpid()))
(folder / f"up-{rank}").touch()
time.sleep(60)
"""


class PdshJob:
    """A job of two hosts with one rank each, over the fake pdsh, and a stranger's process of the same looks."""

    def __init__(self, folder: Path) -> None:
        self.fakes = FakePrograms(folder / "fakes")
        package = self.fakes.folder / "deepspeed" / "launcher"
        package.mkdir(parents=True)
        for path in (package / "__init__.py", package.parent / "__init__.py"):
            path.touch()
        (package / "launch.py").write_text(LAUNCH)
        (self.fakes.folder / "rank.py").write_text(RANK)
        environment = {"A_VALUE": "plain,1:2", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.spec = spec(folder / "q", environment, hosts=(Host("a", 1), Host("b", 1)))
        self.spec.folder.mkdir(parents=True)
        self.spec.write()
        (command,) = launcher("pdsh", folder).commands(self.spec)
        # The packages come from this installation here, and from the fake one behind the fake pdsh.
        environment = {**command.environment, **self.fakes.variables}
        # What a user's shell may hold: DeepSpeed would export both, the first unquoted.
        environment |= {"NCCL_EVIL": f"$(touch {folder}/evil)", "PYTHON_EVIL": f"`touch {folder}/evil`"}
        words = ["cogview2.stages.pretrain_coglm", "--run-dir", str(self.spec.run), "--attempt", "2"]
        self.stranger = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)", *words], env={**environment, "RANK": "0"}
        )
        (folder / "log").touch()
        with open(folder / "log", "w") as log:
            self.runner = subprocess.Popen(
                command.argv, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )

    def told(self, rank: int) -> str:
        path = self.fakes.folder / f"told-{rank}"
        return path.read_text() if path.exists() else ""

    def pid(self, rank: int) -> int:
        return int((self.spec.folder / f"rank-{rank}.pid").read_text())

    def close(self) -> None:
        self.stranger.kill()
        self.stranger.wait()
        for rank in (0, 1):
            if (self.spec.folder / f"rank-{rank}.pid").exists() and alive(self.pid(rank)):
                os.kill(self.pid(rank), signal.SIGKILL)
        if self.runner.poll() is None:
            self.runner.kill()
        self.runner.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[PdshJob]:
    made = PdshJob(tmp_path)
    try:
        wait_for(lambda: all((made.fakes.folder / f"up-{rank}").exists() for rank in (0, 1)))
        yield made
    finally:
        made.close()


def test_sigusr1_asks_the_ranks_of_this_attempt_to_leave(job: PdshJob, tmp_path: Path) -> None:
    argv, environment, folder = json.loads((job.fakes.folder / "rank-1.json").read_text())
    assert argv == ["cogview2.stages.pretrain_coglm", "--run-dir", str(job.spec.run), "--attempt", "1"]
    assert environment["A_VALUE"] == "plain,1:2"
    assert "NCCL_EVIL" not in environment and "PYTHON_EVIL" not in environment
    assert folder == str(job.spec.folder)
    job.runner.send_signal(signal.SIGUSR1)
    wait_for(lambda: job.told(0) and job.told(1))
    job.runner.wait(timeout=30)
    assert (job.told(0), job.told(1)) == ("SIGTERM", "SIGTERM")
    assert job.stranger.poll() is None
    assert not (tmp_path / "evil").exists()


def test_sigterm_to_the_runner_kills_this_attempts_ranks_and_no_stranger(job: PdshJob) -> None:
    job.runner.send_signal(signal.SIGTERM)
    wait_for(lambda: not alive(job.pid(0)) and not alive(job.pid(1)))
    job.runner.wait(timeout=30)
    assert not (job.fakes.folder / "pkill-was-called").exists()
    sent = [path.read_bytes() for path in job.fakes.folder.glob("pdsh-*.argv")]
    assert len(sent) == 2 and not any(b"pkill" in words for words in sent)
    assert (job.told(0), job.told(1)) == ("", "")  # SIGKILL: this is the way for ranks that do not leave
    assert job.stranger.poll() is None
