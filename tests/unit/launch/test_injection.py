"""Nothing in a host list, a recipe, a path or a name executes: payloads through every launcher, and the commands really run.

Each payload would make a file, the canary. A launcher may refuse it in one sentence; what it accepts is started with
programs that read words as the real ones do, and has to arrive at the far end as it is.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hosts import FakeHosts
from fake_programs import FakePrograms
from payloads import ACCEPTING, HONEST, QUOTING, REFUSING, STRICT, TEXTS, Job, Place

from cogview2.launch import cli, launchers, mpi, slurm, ssh_command
from cogview2.launch.hostfile import read_hostfile
from cogview2.launch.job import Host, JobSpec
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import CogView2Error, LaunchError
from cogview2.pipeline.run_dir import RunDirectory


class Outcome:
    """How many payloads were refused and executed."""

    def __init__(self) -> None:
        self.refused = self.executed = 0
        self.payloads: set[tuple[str, str]] = set()


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("quickstart", ["launch.ranks_per_node=1", "launch.slurm.gpus=false"])


@pytest.fixture
def job(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Job:
    fakes = FakePrograms(tmp_path / "fakes")
    fakes.program("scontrol", '[ "$1" = show ] && echo n1')
    for name, value in {**fakes.variables, "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    for name in mpi._ALLOW_ROOT:
        monkeypatch.setenv(name, "1")
    return Job(tmp_path, fakes, recipe, tmp_path / "runs")


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "cage" / "canary"
    path.parent.mkdir()
    yield path
    assert not sings(path)


def sings(canary: Path) -> bool:
    """Return whether anything was made in the canary's own folder: some payloads add to its name."""
    return any(canary.parent.iterdir())


def attack(job: Job, place: Place, text: str, launcher: str, outcome: Outcome) -> None:
    """Put one payload into one place and start the job; refused means a sentence before anything starts."""
    try:
        place(job, text).execute(launcher)
        outcome.executed += 1
    except (CogView2Error, ValueError) as error:
        assert not isinstance(error, UnicodeError)
        outcome.refused += 1


@pytest.mark.parametrize("launcher", QUOTING)
@pytest.mark.parametrize("place", ACCEPTING)
def test_values_and_paths_never_execute(place: str, launcher: str, job: Job, canary: Path) -> None:
    outcome = Outcome()
    for text in TEXTS:
        attack(job, ACCEPTING[place], text.replace("CANARY", str(canary)), launcher, outcome)
        assert not sings(canary), text
    assert outcome.executed >= (len(TEXTS) if place == "variable value" else len(TEXTS) // 2)


@pytest.mark.parametrize("launcher", REFUSING)
@pytest.mark.parametrize("place", ACCEPTING)
def test_launchers_that_do_not_quote_refuse_them_all(
    place: str, launcher: str, job: Job, canary: Path
) -> None:
    job.fakes.folder.joinpath("mpirun-version").write_text("HYDRA" if launcher == "mpich" else "(Open MPI)")
    for text in TEXTS + HONEST:
        with pytest.raises(LaunchError, match="unquoted; use only letters"):
            ACCEPTING[place](job, text.replace("CANARY", str(canary))).commands(launcher)


@pytest.mark.parametrize("place", STRICT)
def test_words_with_an_alphabet_never_execute(place: str, job: Job, canary: Path) -> None:
    outcome = Outcome()
    for text in TEXTS:
        for launcher in ("hostfile", "mpi") if place.startswith("hostfile") else ("slurm",):
            attack(job, STRICT[place], text.replace("CANARY", str(canary)), launcher, outcome)
            assert not sings(canary), (text, launcher)
    assert outcome.executed == 0


def test_there_are_enough_payloads() -> None:
    pairs = {(place, text) for place in (*ACCEPTING, *STRICT) for text in TEXTS}
    tried = len(TEXTS) * (len(ACCEPTING) * len(QUOTING + REFUSING) + len(STRICT))
    places = len(ACCEPTING) + len(STRICT)
    print(f"{len(set(TEXTS))} texts in {places} places: {len(pairs)} payloads, {tried} jobs")
    assert len(set(TEXTS)) >= 30
    assert len(pairs) >= 40


@pytest.mark.parametrize("launcher", QUOTING)
def test_honest_values_arrive_byte_for_byte(launcher: str, job: Job) -> None:
    for text in HONEST:
        every = job
        for place in ACCEPTING.values():
            every = place(every, text)
        if launcher == "slurm" and {"\\", "\t"} & set(
            text
        ):  # Slurm writes no log there, which is said (test_slurm)
            every = ACCEPTING["variable value"](job, text)
        every.execute(launcher)


def test_every_payload_is_a_real_one(tmp_path: Path) -> None:
    """At least one of the ways in which a careless launcher writes a command lets each of them out."""
    careless = ("echo {}", "echo '{}'", 'echo "{}"', "A={} true", "{}", 'A="{}"; echo $(({}))')
    elsewhere = ("--wrap", "%n", "x=()", "a # b", "EOF")  # for a scheduler, pdsh, an old bash, a script
    for index, text in enumerate(TEXTS):
        canary = tmp_path / str(index) / "canary"
        canary.parent.mkdir()
        payload = text.replace("CANARY", str(canary)).removeprefix("-oProxyCommand=")
        for form in careless:
            command = ["bash", "-c", form.replace("{}", payload)]
            subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
            if sings(canary):
                break
        assert sings(canary) or text.startswith(elsewhere), text


# --- the harness notices --------------------------------------------------------------------------------------


def test_a_launcher_without_quotes_is_caught(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_command.shlex, "join", lambda words: " ".join(words))
    caught = sung(job, "hostfile", "runs-dir", tmp_path)
    assert caught >= 10


def test_a_script_without_quotes_is_caught(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.shlex, "quote", lambda word: word)
    caught = sung(job, "slurm", "runs-dir", tmp_path)
    assert caught >= 10


def sung(job: Job, launcher: str, place: str, folder: Path) -> int:
    """Return how many payloads executed."""
    caught = 0
    for index, text in enumerate(TEXTS):
        canary = folder / "cages" / str(index) / "canary"
        canary.parent.mkdir(parents=True)
        try:
            attack(job, ACCEPTING[place], text.replace("CANARY", str(canary)), launcher, Outcome())
        except AssertionError:
            pass
        job.fakes.arrived()
        caught += sings(canary)
    return caught


# --- the command line, and what schedulers say ----------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["submit", "quickstart", "--launcher", "slurm", "--dry-run", "--name", "TEXT"],
        ["submit", "quickstart", "--launcher", "slurm", "--dry-run", "--stages", "TEXT"],
        ["submit", "quickstart", "--launcher", "hostfile", "--dry-run", "--hosts", "TEXT"],
        ["submit", "quickstart", "--launcher", "TEXT", "--dry-run"],
        ["submit", "TEXT", "--launcher", "slurm", "--dry-run"],
        ["submit", "quickstart", "--launcher", "slurm", "--dry-run", "--set", "launch.interface=TEXT"],
        ["submit", "quickstart", "--launcher", "slurm", "--dry-run", "--set", "TEXT=1"],
        ["submit", "quickstart", "--launcher", "slurm", "--dry-run", "--set", "launch.slurm.nodes=TEXT"],
    ],
)
def test_the_command_line_refuses(
    words: list[str], job: Job, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in TEXTS[:2]:
        try:
            code = cli.main([word.replace("TEXT", text.replace("CANARY", str(canary))) for word in words])
        except SystemExit as leaving:  # argparse
            code = int(leaving.code or 0)
        assert code in (1, 64, 78)


@pytest.mark.parametrize(
    "override",
    [
        'launch.interface=!!python/object/apply:os.system ["touch CANARY"]',
        'launch.environment={"A": !!python/object/apply:os.system ["touch CANARY"]}',
        'launch.environment=!!python/object/new:os.system ["touch CANARY"]',
        "data.folder.path=!!python/name:os.system",
        'name=!!python/object/apply:subprocess.run [["touch", "CANARY"]]',
    ],
)
def test_overrides_are_values_and_no_objects(override: str, canary: Path) -> None:
    with pytest.raises(CogView2Error):
        load_recipe("quickstart", [override.replace("CANARY", str(canary))])


def test_what_schedulers_print_is_no_command(job: Job, canary: Path) -> None:
    run = RunDirectory(job.folder / "runs" / "quickstart").create(job.recipe)
    for name in ("scontrol", "sbatch"):
        job.fakes.program(name, f"cat {job.folder}/printed")
    for text in TEXTS:
        (job.folder / "printed").write_text(text.replace("CANARY", str(canary)) + "\n")
        with pytest.raises(LaunchError):
            launchers.make("slurm").hosts(job.recipe)
        with pytest.raises(LaunchError):
            slurm.submit(run, job.recipe, ("evaluate",))
        assert not sings(canary), text


def test_hosts_and_attempts_of_a_damaged_job_file(job: Job, canary: Path) -> None:
    spec = job.spec(launchers.make("local"))
    spec.folder.mkdir(parents=True)
    spec.write()
    content = json.loads(spec.file.read_text())
    for text in TEXTS:
        payload = text.replace("CANARY", str(canary))
        with pytest.raises(LaunchError):
            Host(payload, 1)
        with pytest.raises(LaunchError):
            ssh_command.ssh_argv(payload, ["true"], job.recipe.launch.ssh)
        for change in (
            {"attempt": payload},
            {"stage": payload},
            {"environment": {payload: "1"}},
            {"master_port": payload},
        ):
            spec.file.write_text(json.dumps(content | change))
            with pytest.raises(LaunchError):
                JobSpec.read(spec.file)


def test_honest_values_reach_a_rank_through_the_real_agent(tmp_path: Path, recipe: Recipe) -> None:
    """ssh and srun both end in an agent, which reads job.json and starts DeepSpeed (a fake one here)."""
    fakes = FakeHosts(tmp_path / "fakes", ("127.0.0.1",))
    fakes.file.write_text("127.0.0.1 slots=1\n")
    values = {f"V{index}": text for index, text in enumerate((*HONEST, *TEXTS))}
    run = tmp_path / "it's my {0..3} $(run)"
    run.mkdir()
    (run / "mode").write_text("fail")
    spec = JobSpec("evaluate", run, 1, read_hostfile(fakes.file), "127.0.0.1", 29555, values)
    spec.folder.mkdir(parents=True)
    spec.write()
    binaries = FakePrograms(tmp_path / "programs").binaries
    hostfile = launchers.make("hostfile", fakes.file)
    for launcher, path in (
        (hostfile, fakes.path),
        (launchers.make("slurm"), f"{binaries}:{os.environ['PATH']}"),
    ):
        (command,) = launcher.commands(spec)
        environment = {**command.environment, "PATH": path, "PYTHONPATH": str(fakes.folder)}
        with subprocess.Popen(command.argv, env=environment, stdin=subprocess.PIPE) as process:
            assert process.wait(timeout=60) == 70  # as the fake rank says
        found = json.loads((run / "env-0.json").read_text())
        assert found.items() >= values.items()
        (run / "env-0.json").unlink()
        for record in spec.folder.glob("outcome-*"):
            record.unlink()
