"""Slurm: the text of the batch script, what it does when it is run, the chain of jobs, and the allocation's launcher."""

import functools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_programs import program

from cogview2.launch import requeue, slurm
from cogview2.launch.slurm_script import batch_script
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import ConfigError, LaunchError
from cogview2.pipeline.run_dir import RunDirectory

EXPECTED = Path(__file__).with_name("expected.sbatch")
SLURM = ["launch.slurm.nodes=2", "launch.ranks_per_node=4", "launch.threads_per_rank=3"]
FULL = [
    *SLURM,
    "launch.slurm.partition=long",
    "launch.slurm.account=physics",
    "launch.slurm.qos=high",
    "launch.slurm.constraint=a100",
    "launch.slurm.time=2-00:00:00",
    "launch.slurm.max_requeues=7",
    'launch.slurm.extra=["--exclusive", "--gres=nic:1"]',
]


@functools.cache
def recipe(*overrides: str) -> Recipe:
    return load_recipe("quickstart", [*SLURM, *overrides])


def test_the_script_is_the_one_that_was_read_and_approved() -> None:
    script = batch_script(
        Path("/data/my runs/emoji-6b"),
        load_recipe("quickstart", [*FULL]),
        "pretrain_coglm",
        python="/opt/env/bin/python",
        workdir=Path("/home/ann"),
    )
    assert script == EXPECTED.read_text()


def test_bash_reads_the_script() -> None:
    subprocess.run(["bash", "-n", str(EXPECTED)], check=True)


def test_gpus_are_asked_for_unless_there_are_none() -> None:
    assert "--gpus-per-node=4\n" in batch_script(Path("/r/q"), recipe(), "evaluate")
    assert "gpus" not in batch_script(Path("/r/q"), recipe("launch.slurm.gpus=false"), "evaluate")


@pytest.mark.parametrize("option", ["--output=/x", "--array=1-4", "--ntasks=8", "--no-requeue", "--wrap=x"])
def test_options_that_the_script_lives_by_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="the batch script sets that option itself; remove it"):
        batch_script(Path("/r/q"), recipe(f'launch.slurm.extra=["{option}"]'), "evaluate")


@pytest.mark.parametrize(
    ("run", "words"),
    [("/a\nb/q", "line break"), ("/a\\b/q", "backslash"), ("/a\x7f/q", "control character")],
)
def test_paths_that_no_script_can_hold_are_refused(run: str, words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        batch_script(Path(run), recipe(), "evaluate")


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed")
def test_the_real_sbatch_reads_back_what_was_written(tmp_path: Path) -> None:
    """sbatch parses the script before it looks for a controller; with -vv it says what it understood."""
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nAuthType=auth/none\nSlurmctldPort=1\nMessageTimeout=2\n"
        "NodeName=n1\nPartitionName=p Nodes=n1\n"
    )
    run = Path('/data/it\'s "my" runs #1/100%/$(touch x) {0..3} ü;&|<>*?~/q')
    script = tmp_path / "s.sbatch"
    script.write_text(batch_script(run, load_recipe("quickstart", FULL), "evaluate", workdir=run))
    environment = {
        "PATH": os.environ["PATH"],
        "SLURM_CONF": str(tmp_path / "slurm.conf"),
        "LC_ALL": "C.UTF-8",
    }
    # The one connection attempt that matters not: the options are printed before it.
    with subprocess.Popen(
        ["sbatch", "-vv", str(script)], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "end of defined options" in line:
                break
        process.kill()
    said = {}
    for line in lines:
        name, separator, value = line.removeprefix("sbatch: ").partition(" : ")
        if separator:
            said[name.strip()] = value.rstrip("\n")
    assert said["output"] == f"{run}/submit/evaluate-%j.log".replace("100%", "100%%")
    assert said["chdir"] == str(run)
    assert said["job-name"] == "cogview2-quickstart-evaluate"
    assert said["partition"] == "long"
    assert said["signal"] == "B:USR1@600"
    assert said["exclusive"] == "exclusive"


class Script:
    """A rendered script with a fake driver, run under bash as slurmd would."""

    def __init__(self, folder: Path, driver: str, *, answer: int = 0) -> None:
        self.folder = folder
        self.run = folder / "it's a $(touch canary) run" / "quickstart"
        self.run.mkdir(parents=True)
        python = folder / "python"
        # As `python -P -m MODULE ...`: the driver is bash text, the guard answers with an exit code.
        program(
            folder,
            "python",
            f"""printf '%s\\n' "$@" > {folder}/words.$3
if [ "$3" = cogview2.launch.requeue ]; then exit {answer}; fi
echo $$ > {folder}/driver.pid
{driver}""",
        )
        program(folder, "scontrol", f'printf "%s " "$@" >> {folder}/requeued')
        self.path = folder / "s.sbatch"
        self.path.write_text(
            batch_script(self.run, recipe(), "pretrain_coglm", python=str(python), workdir=folder)
        )

    def start(self, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            **variables,
        }
        return subprocess.Popen(
            ["bash", str(self.path)], env=environment, cwd=self.folder, stdout=subprocess.PIPE, text=True
        )

    def wait_for_driver(self) -> None:
        deadline = time.monotonic() + 10
        while not (self.folder / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def words(self, module: str) -> list[str]:
        return (self.folder / f"words.cogview2.launch.{module}").read_text().splitlines()

    @property
    def requeued(self) -> str:
        path = self.folder / "requeued"
        return path.read_text() if path.exists() else ""


WAITING = """trap 'echo USR1 >> {0}/got; sleep 0.3; exit 75' USR1
trap 'echo TERM >> {0}/got; sleep 0.3; exit 75' TERM
touch {0}/ready
for k in $(seq 200); do sleep 0.05; done"""


@pytest.mark.parametrize("code", [0, 1, 70, 78, 139])
def test_the_exit_code_is_the_drivers(tmp_path: Path, code: int) -> None:
    script = Script(tmp_path, f"exit {code}")
    with script.start() as process:
        assert process.wait(timeout=20) == code
    assert script.requeued == ""
    assert script.words("cli") == [
        *("-P", "-m", "cogview2.launch.cli", "run", f"{script.run}/recipe.yaml", "--name", "quickstart"),
        *("--runs-dir", str(script.run.parent), "--stages", "pretrain_coglm", "--launcher", "slurm"),
    ]
    assert not (tmp_path / "canary").exists()


def test_the_warning_before_the_limit_reaches_the_driver_and_the_job_goes_back(tmp_path: Path) -> None:
    script = Script(tmp_path, WAITING.format(tmp_path))
    with script.start(SLURM_RESTART_COUNT="3") as process:
        script.wait_for_driver()
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)  # again, while it waits: the driver's own end still counts
        assert process.wait(timeout=20) == 75
    assert (tmp_path / "got").read_text().startswith("USR1\n")
    assert script.requeued == "requeue 4711 "
    assert script.words("requeue") == [
        *("-P", "-m", "cogview2.launch.requeue", "--run-dir", str(script.run), "--stage", "pretrain_coglm"),
        *("--restarts", "3", "--limit", "100"),
    ]


def test_a_cancelled_job_saves_and_stays_away(tmp_path: Path) -> None:
    script = Script(tmp_path, WAITING.format(tmp_path))
    with script.start() as process:
        script.wait_for_driver()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 75
    assert (tmp_path / "got").read_text() == "TERM\n"
    assert script.requeued == ""


def test_the_guard_is_obeyed(tmp_path: Path) -> None:
    script = Script(tmp_path, "exit 75", answer=1)
    with script.start() as process:
        assert process.wait(timeout=20) == 75
    assert script.requeued == ""
    assert "--restarts" in script.words("requeue")


def test_a_requeue_that_slurm_refuses_is_said(tmp_path: Path) -> None:
    script = Script(tmp_path, "exit 75")
    program(tmp_path, "scontrol", "exit 1")
    with script.start() as process:
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(timeout=20) == 75
    assert "requeue job 4711 by hand, or submit again" in said


# --- the guard ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "quickstart").create(recipe())


def commit(run: RunDirectory, unit: str, step: int) -> None:
    folder = run.stage(unit).checkpoints / f"step_{step:09d}"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text("{}")


def ask(run: RunDirectory, *words: str, stage: str = "pretrain_coglm") -> int:
    return requeue.main(["--run-dir", str(run.path), "--stage", stage, "--limit", "3", *words])


def test_a_job_goes_back_only_while_it_gains_something(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    requeue.remember(run, "pretrain_coglm")  # at submission
    assert ask(run) == 1
    assert "nothing was saved since it was started before" in capsys.readouterr().out
    (run.stage("pretrain_coglm").checkpoints / ".staging.step_000000005").mkdir(parents=True)
    (run.stage("pretrain_coglm").checkpoints / "step_000000005").mkdir()  # without its manifest it is none
    assert ask(run) == 1
    commit(run, "pretrain_coglm", 10)
    assert ask(run) == 0
    assert "it goes on from pretrain_coglm step 10 (restart 1 of 3)" in capsys.readouterr().out
    assert ask(run, "--restarts", "1") == 1  # the same checkpoint again
    commit(run, "pretrain_coglm", 20)
    shutil.rmtree(run.stage("pretrain_coglm").checkpoints / "step_000000010")  # retention is no loss
    assert ask(run, "--restarts", "1") == 0
    commit(run, "pretrain_coglm", 30)
    assert ask(run, "--restarts", "3") == 1
    assert "launch.slurm.max_requeues is 3" in capsys.readouterr().out


def test_progress_of_a_stage_with_parts_and_of_one_without_checkpoints(run: RunDirectory) -> None:
    requeue.remember(run, "finetune_superres")
    commit(run, "finetune_superres/direct", 5)
    assert ask(run, stage="finetune_superres") == 0
    assert ask(run, stage="finetune_superres") == 1
    requeue.remember(run, "shard_dataset")
    folder = run.stage("shard_dataset").path / "progress" / "train"
    folder.mkdir(parents=True)
    (folder / ".000000.json.tmp").touch()
    attempt = run.stage("shard_dataset").new_attempt()
    (attempt.path / "rank-0.log").touch()
    assert ask(run, stage="shard_dataset") == 1  # logs and unfinished files are no progress
    (folder / "000000.json").touch()
    assert ask(run, stage="shard_dataset") == 0


def test_an_unreadable_memory_is_no_memory(run: RunDirectory) -> None:
    commit(run, "pretrain_coglm", 10)
    path = requeue.progress_path(run, "pretrain_coglm")
    path.parent.mkdir()
    path.write_text("[]")
    assert ask(run) == 0
    assert ask(run) == 1


# --- submission -----------------------------------------------------------------------------------------------


def test_the_stages_are_submitted_as_a_chain(
    run: RunDirectory, binaries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(
        binaries,
        "sbatch",
        f'echo "$@" >> {tmp_path}/calls; echo "$((100 + $(wc -l < {tmp_path}/calls)));main"',
    )
    ids = slurm.submit(run, recipe(), ("pretrain_coglm", "finetune_superres", "evaluate"))
    assert ids == ["101", "102", "103"]
    folder = run.path / "submit"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--parsable {folder}/04-pretrain_coglm.sbatch",
        f"--parsable --dependency=afterok:101 {folder}/05-finetune_superres.sbatch",
        f"--parsable --dependency=afterok:102 {folder}/06-evaluate.sbatch",
    ]
    for path in folder.glob("*.sbatch"):
        subprocess.run(["bash", "-n", str(path)], check=True)
    said = capsys.readouterr().out
    assert "finetune_superres: job 102 after job 101" in said
    assert "squeue --jobs=101,102,103" in said
    assert ask(run) == 1  # the guard counts from here


def test_what_sbatch_says_is_passed_on_and_earlier_jobs_are_named(
    run: RunDirectory, binaries: Path, tmp_path: Path
) -> None:
    program(
        binaries,
        "sbatch",
        f"if [ -e {tmp_path}/one ]; then echo 'sbatch: error: invalid partition: x' >&2; exit 1; fi\n"
        f"touch {tmp_path}/one; echo 7",
    )
    with pytest.raises(
        LaunchError, match=r"invalid partition: x \(jobs 7 are in the queue: scancel 7\); correct"
    ):
        slurm.submit(run, recipe(), ("pretrain_coglm", "evaluate"))
    program(binaries, "sbatch", "echo Submitted batch job")
    with pytest.raises(LaunchError, match="sbatch did not take .*: Submitted batch job"):
        slurm.submit(run, recipe(), ("evaluate",))


def test_no_sbatch_is_one_sentence(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="sbatch is not on the PATH; submit from a login node"):
        slurm.submit(run, recipe(), ("evaluate",))
    assert not (run.path / "submit").exists()


def test_done_stages_at_the_front_are_left_out(
    run: RunDirectory, binaries: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(binaries, "sbatch", "echo 1")
    stage = run.stage("train_tokenizer").create()
    stage.write_done(
        run.inputs("train_tokenizer", recipe()), [], run.fingerprint(recipe(), "train_tokenizer")
    )
    slurm.submit(run, recipe(), ("train_tokenizer", "train_vqvae"))
    assert sorted(path.name for path in (run.path / "submit").glob("*.sbatch")) == ["02-train_vqvae.sbatch"]
    assert slurm.submit(run, recipe(), ("train_tokenizer",)) == []
    assert "nothing to submit" in capsys.readouterr().out


def test_a_dry_run_shows_everything_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = RunDirectory(tmp_path / "q")
    shown = recipe('launch.environment={"NCCL_IB_HCA": "mlx5", "HUB_TOKEN": "hunter2"}')
    assert slurm.submit(run, shown, ("train_vqvae", "evaluate"), dry_run=True) == []
    said = capsys.readouterr().out
    assert batch_script(run.path, shown, "train_vqvae") in said
    assert "sbatch --parsable --dependency=afterok:JOB_OF_train_vqvae" in said
    assert "srun --nodes=2 --ntasks=2" in said
    assert "cogview2.launch.agent --job" in said
    assert "NCCL_IB_HCA=mlx5" in said
    assert "HUB_TOKEN='(redacted)'" in said and "hunter2" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--no-requ", "--sig=B:TERM@5", "--outp=/dev/null"])
def test_beginnings_of_its_own_options_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="sets that option itself"):
        batch_script(Path("/r/q"), recipe(f'launch.slurm.extra=["{option}"]'), "evaluate")


def test_a_time_limit_that_leaves_no_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="signal_seconds 600 leaves nothing of slurm.time 00:05:00"):
        recipe("launch.slurm.time=00:05:00")
