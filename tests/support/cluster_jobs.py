"""Jobs on the hosts of a `Lan`: a tiny recipe, `cogview2 submit` on the driver, and what is left of a job."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import tiny_runs
from cluster_hosts import Host, Lan, Program, wait_for

from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.run_dir import RunDirectory

COGLM = "pretrain_coglm"
LONG = ("coglm.train.steps=120", "coglm.train.checkpoint.every_steps=10")
"""Training that lasts long enough to be interrupted, and saves often."""
STOP_SECONDS = 150.0
"""More than a host or a driver may take to notice that the others are gone."""


def run_of(finished: tiny_runs.Finished, runs: Path, name: str) -> RunDirectory:
    """Return a new run `runs/NAME`: a copy of a finished one up to its shards."""
    return tiny_runs.copy(finished.run, runs / name, until="shard_dataset")


class Cluster:
    """A Lan, the folder of runs that its hosts share, and a recipe."""

    def __init__(self, lan: Lan, folder: Path) -> None:
        self.lan = lan
        self.folder = folder
        self.runs = folder / "runs"
        self.runs.mkdir(parents=True)
        self.recipe = self.write_recipe("tiny")

    def write_recipe(self, name: str, *overrides: str) -> Path:
        """Write the tiny recipe to a file NAME.yaml."""
        recipe = load_recipe("quickstart", [*tiny_runs.OVERRIDES, f"name={name}", *overrides])
        path = self.folder / f"{name}.yaml"
        created = RunDirectory(self.folder / f"recipe-of-{name}").create(recipe)
        shutil.copy(created.recipe_path, path)
        shutil.rmtree(created.path)
        return path

    def hosts_file(self, hosts: Sequence[Host | str], slots: int = 1) -> Path:
        """Write a host list; a text stands for a name in it."""
        names = [host if isinstance(host, str) else host.name for host in hosts]
        path = self.folder / "hosts.txt"
        path.write_text("# made by a test\n" + "".join(f"{name} slots={slots}\n" for name in names))
        return path

    def arguments(self, command: str, name: str, *words: str, settings: Sequence[str] = ()) -> list[str]:
        """Return `cogview2 COMMAND` of the recipe as run NAME."""
        sets = [word for setting in settings for word in ("--set", setting)]
        where = ["--name", name, "--runs-dir", str(self.runs)]
        return ["cogview2", command, str(self.recipe), *where, *words, *sets]

    def submit(
        self,
        name: str,
        hosts: Path,
        *words: str,
        settings: Sequence[str] = (),
        launcher: str = "hostfile",
        **environment: str,
    ) -> Program:
        """Start `cogview2 submit` of CogLM's training on the driver."""
        where = ["--launcher", launcher, "--hosts", str(hosts), "--stages", COGLM]
        argv = self.arguments("submit", name, *where, *words, settings=settings)
        return self.lan.driver.start(*argv, folder=self.folder, **environment)

    def finish(self, program: Program, code: int = 0, seconds: float = 150.0) -> str:
        """Wait for a submission; return what it printed."""
        given = program.wait(seconds)
        assert given == code, f"exit code {given}, not {code}:\n{program.output}"
        return program.output

    def left_over(self, name: str) -> dict[str, list[str]]:
        """Return host -> living processes that have to do with run NAME."""
        word = str(self.runs / name)
        found = {host.name: host.processes(word) for host in self.lan.hosts if host.is_on}
        return {name: lines for name, lines in found.items() if lines}

    def wait_until_empty(self, name: str, seconds: float = STOP_SECONDS) -> None:
        """Wait until no process of a run lives on any host."""
        wait_for(lambda: not self.left_over(name), f"end of all processes: {self.left_over(name)}", seconds)


def wait_for_checkpoint(run: RunDirectory, program: Program | None, step: int, stage: str = COGLM) -> None:
    """Wait until a checkpoint is committed; the submission must be alive then."""
    path = run.stage(stage).checkpoints / f"step_{step:09d}"

    def seen() -> bool:
        assert program is None or not program.ended, f"ended before step {step}:\n{program.output}"
        return path.is_dir()

    wait_for(seen, f"checkpoint of step {step}", 90.0)


def saved_steps(run: RunDirectory, stage: str = COGLM) -> list[int]:
    """Return the steps of the committed checkpoints, oldest first."""
    return sorted(
        int(path.name.removeprefix("step_")) for path in run.stage(stage).checkpoints.glob("step_*")
    )


def assert_same_training(one: RunDirectory, other: RunDirectory, unit: str = COGLM) -> None:
    """Assert that two runs trained alike: every number of every step, and every byte of the weights."""
    assert tiny_runs.metrics(one, unit) == tiny_runs.metrics(other, unit)
    assert tiny_runs.digests(one.stage(unit).output) == tiny_runs.digests(other.stage(unit).output)
