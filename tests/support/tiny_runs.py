"""Runs of a very tiny recipe: through the command line, or stage by stage with ranks started by hand."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.stages import STAGES
from cogview2.pipeline.run_dir import RunDirectory

LIMIT_SECONDS = 120.0
_TRAINED = ("vqvae", "coglm", "direct_sr", "iterative_sr")
OVERRIDES = [
    "launch.ranks=2",
    "launch.threads_per_rank=1",
    "data.drawings.count=64",
    "data.held_out=8",
    "tokenizer.input_sentences=200",
    "tokenizer.seed_pieces=2000",
    "vqvae.model.latent_channels=8",
    "vqvae.model.codebook_size=32",
    "vqvae.autoencoder_steps=2",
    "vqvae.restart_after=2",
    "shards.samples_per_shard=8",
    "shards.vqvae_batch=4",
    "coglm.model.layers=2",
    "coglm.model.hidden=32",
    "coglm.model.heads=2",
    "coglm.model.dropout=0.1",
    "coglm.model.vocabulary.text_pieces=200",
    "sampling.clusters=8",
    "evaluate.captions=8",
    "evaluate.chunk=2",
    "evaluate.classifier_steps=5",
    "evaluate.allow_few=true",
    "evaluate.described=4",
    "evaluate.ranked=2",
    "evaluate.ranking_candidates=2",
    "evaluate.edited=2",
    *(f"{name}.train.log_every=1" for name in _TRAINED),
    *(f"{name}.train.sample_every=0" for name in _TRAINED),
    *(f"{name}.train.optimizer.warmup_steps=1" for name in _TRAINED),
    *(f"{name}.train.checkpoint.every_steps=2" for name in _TRAINED),
    *(f"{name}.train.steps=6" for name in ("vqvae", "coglm")),
    *(f"{name}.train.global_batch=16" for name in ("vqvae", "coglm")),
    *(f"{name}.train.steps=2" for name in ("direct_sr", "iterative_sr")),
    *(f"{name}.train.global_batch=8" for name in ("direct_sr", "iterative_sr")),
]


@dataclass(frozen=True)
class Finished:
    """A finished cascade and the command that made it."""

    run: RunDirectory
    arguments: list[str]
    output: str


def environment() -> dict[str, str]:
    """Return the environment of a CPU job."""
    threads = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    return dict(os.environ) | threads | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def command_line(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `cogview2 ARGUMENTS`."""
    argv = [sys.executable, "-m", "cogview2.launch.cli", *arguments]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, (
        f"{arguments} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    )
    return done


def run_arguments(runs: Path, *overrides: str) -> list[str]:
    """Return the arguments of `cogview2 run` of the tiny recipe."""
    sets = [word for override in (*OVERRIDES, *overrides) for word in ("--set", override)]
    return ["run", "quickstart", "--name", "tiny", "--runs-dir", str(runs), *sets]


def run_cascade(runs: Path) -> Finished:
    """Run all six stages through the command line and the launcher."""
    arguments = run_arguments(runs)
    return Finished(RunDirectory(runs / "tiny"), arguments, command_line(*arguments).stdout)


def new_run(path: Path, *overrides: str) -> RunDirectory:
    """Create a run directory of the tiny recipe."""
    return RunDirectory(path).create(load_recipe("quickstart", [*OVERRIDES, *overrides]))


def copy(run: RunDirectory, path: Path, until: str) -> RunDirectory:
    """Copy a run with its stages up to `until`."""
    shutil.copytree(run.path, path, ignore=shutil.ignore_patterns("evaluation"))
    for stage in list(STAGES)[list(STAGES).index(until) + 1 :]:
        shutil.rmtree(path / "stages" / stage, ignore_errors=True)
    return RunDirectory(path)


def override(run: RunDirectory, *overrides: str) -> RunDirectory:
    """Change the recipe of a run."""
    run.write_recipe(load_recipe(str(run.recipe_path), list(overrides)))
    return run


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """The ranks of one stage, started without a launcher."""

    def __init__(self, run: RunDirectory, stage: str, count: int = 1) -> None:
        self.attempt: Attempt = run.stage(stage).new_attempt()
        argv = [sys.executable, "-m", f"cogview2.stages.{stage}"]
        argv += ["--run-dir", str(run.path), "--attempt", str(self.attempt.number)]
        shared = environment() | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(count),
        }
        self.processes = []
        for rank in range(count):
            with open(self.attempt.path / f"output-{rank}.txt", "wb") as output:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen(argv, env=shared | own, stdout=output, stderr=subprocess.STDOUT)
                self.processes.append(process)

    def wait(self) -> list[int]:
        """Return the exit codes; ranks that take too long are killed."""
        deadline = time.monotonic() + LIMIT_SECONDS
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"ranks hang\n{self.logs()}") from error
        finally:
            self.kill()

    def when(self, condition: Callable[[], bool]) -> "Ranks":
        """Wait until `condition` holds, while all ranks live."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            ended = [process.poll() for process in self.processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"ended with {ended} before the moment to interrupt it\n{self.logs()}")
            time.sleep(0.002)
        return self

    def kill(self) -> None:
        """Kill all ranks at once, as a power loss does."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def terminate(self, rank: int) -> list[int]:
        """Ask one rank to stop; return all exit codes."""
        self.processes[rank].send_signal(signal.SIGTERM)
        return self.wait()

    def logs(self) -> str:
        """Return the ends of what the ranks said."""
        files = sorted(self.attempt.path.glob("output-*.txt"))
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-3000:]}" for path in files)


def run_stage(run: RunDirectory, stage: str, ranks: int = 1) -> Ranks:
    """Run a stage to its end."""
    started = Ranks(run, stage, ranks)
    codes = started.wait()
    assert codes == [0] * ranks, f"{stage} gave {codes}\n{started.logs()}"
    assert run.is_done(stage)
    return started


def metrics(run: RunDirectory, unit: str) -> list[dict[str, str]]:
    """Return the lines of metrics.jsonl as exact text, without the measured times."""
    from cogview2.pipeline.training.meters import TIMED

    lines = [json.loads(line) for line in run.stage(unit).metrics.read_text().splitlines()]
    return [{key: float(value).hex() for key, value in line.items() if key not in TIMED} for line in lines]


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def evaluation(run: RunDirectory) -> dict[str, Any]:
    """Return evaluation.json."""
    return dict(json.loads((run.stage("evaluate").output / "evaluation.json").read_text()))
