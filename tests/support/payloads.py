"""Texts that would execute where a launcher forgets to quote, and the places of a job where they can stand."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fake_programs import FakePrograms

from cogview2.launch import launchers
from cogview2.launch.job import JobSpec
from cogview2.launch.slurm_script import batch_script
from cogview2.pipeline.config.launch import LaunchConfig
from cogview2.pipeline.config.stages import Recipe

TEXTS = (
    "$(touch CANARY)",
    "`touch CANARY`",
    "a; touch CANARY; b",
    "a && touch CANARY",
    "a || touch CANARY",
    "a & touch CANARY &",
    "a | touch CANARY",
    "a\ntouch CANARY\nb",
    "a\r\ntouch CANARY\r\n",
    "'; touch CANARY; '",
    '"; touch CANARY; "',
    '"$(touch CANARY)"',
    "'\"'$(touch CANARY)'\"'",
    "\\'; touch CANARY; \\'",
    "$'\\''; touch CANARY #",
    "a$(touch${IFS}CANARY)",
    "-oProxyCommand=touch${IFS}CANARY",
    "--wrap=touch CANARY",
    "-x; touch CANARY",
    "${x:=$(touch CANARY)}",
    "$((a[$(touch CANARY)]))",
    "<(touch CANARY)",
    ">CANARY",
    "{a,$(touch CANARY)}",
    "~$(touch CANARY)",
    "*$(touch CANARY)",
    "%n;touch CANARY",
    "a # b\n#SBATCH --wrap='touch CANARY'",
    "EOF\ntouch CANARY\nEOF",
    "x=() { :; }; touch CANARY",
)
HONEST = (
    "two words",
    "it's",
    'say "hi"',
    "$HOME ${HOME} $(pwd)",
    '{"a": [1, 2]}',
    "s-{0..3}.tar",
    "* ? [a-z] ~",
    "back\\slash",
    "tab\tand 'quotes\"",
    "größe 猫 é",
    "100%n %h",
    "-leading --dashes",
    "a=b;c=d,e",
)
QUOTING = ("local", "hostfile", "mpi", "slurm")
REFUSING = ("pdsh", "openmpi", "mpich")
"""DeepSpeed quotes nothing, so these take plain words only."""


@dataclass(frozen=True)
class Job:
    """All that reaches a launcher for one job; a place is where the payload stands."""

    folder: Path
    fakes: FakePrograms
    recipe: Recipe
    runs: Path
    name: str = "q"
    stage: str = "pretrain_coglm"
    attempt: int = 1
    python: Path | None = None
    hosts: str = "n1 slots=1\n"

    def spec(self, launcher: launchers.Launcher) -> JobSpec:
        return JobSpec(
            stage=self.stage,
            run=self.runs / self.name,
            attempt=self.attempt,
            hosts=launcher.hosts(self.recipe),
            master_addr="n1",
            master_port=29555,
            environment=launchers.variables(self.recipe.launch, cpu=True),
            python=str(self.python or self.fakes.python),
        )

    def commands(self, name: str) -> tuple[JobSpec, list[tuple[tuple[str, ...], dict[str, str]]]]:
        """Render the job with one launcher, for slurm with its batch script too."""
        path = self.folder / "hosts"
        path.write_text(self.hosts)
        launcher = launchers.make(name, path if name not in ("local", "slurm") else None)
        spec = self.spec(launcher)
        found = [(command.argv, dict(command.environment)) for command in launcher.commands(spec)]
        if name == "slurm":
            script = self.folder / "s.sbatch"
            script.write_text(
                batch_script(spec.run, self.recipe, self.stage, python=spec.python, workdir=self.folder)
            )
            found.append((("sbatch", "--parsable", str(script)), {}))
        return spec, found

    def execute(self, name: str) -> JobSpec:
        """Render and run; what arrived is asserted to be what was meant."""
        spec, commands = self.commands(name)
        for argv, environment in commands:
            self.fakes.run(argv, environment)
            arrived = self.fakes.arrived()
            assert len(arrived) == 1, (name, argv)
            self._compare(name, argv[0], spec, arrived[0].argv, arrived[0].environment)
        if name in ("hostfile", "slurm"):  # values travel in a file, from which the agents take them
            spec.folder.mkdir(parents=True, exist_ok=True)
            spec.write()
            assert JobSpec.read(spec.file) == spec
        return spec

    def _compare(
        self, name: str, program: str, spec: JobSpec, argv: list[str], environment: dict[str, str]
    ) -> None:
        assert argv[0] == spec.python
        if program == "sbatch":
            assert f"{spec.run}/recipe.yaml" in argv and str(spec.run.parent) in argv
        elif name in ("hostfile", "slurm"):
            assert argv[argv.index("--job") + 1] == str(spec.file)
        else:
            assert argv[argv.index("--run-dir") + 1] == str(spec.run)
            assert environment.items() >= dict(spec.environment).items()


Place = Callable[[Job, str], Job]


def _launch(job: Job, **changes: object) -> Job:
    values = job.recipe.launch.model_dump() | changes
    return replace(job, recipe=job.recipe.model_copy(update={"launch": LaunchConfig.model_validate(values)}))


def _slurm(job: Job, **changes: object) -> Job:
    return _launch(job, slurm=job.recipe.launch.slurm.model_dump() | changes)


def _ssh(job: Job, **changes: object) -> Job:
    return _launch(job, ssh=job.recipe.launch.ssh.model_dump() | changes)


def _python(job: Job, text: str) -> Job:
    path = Path(f"{job.folder}/py/{text}/python")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(job.fakes.python)
    return replace(job, python=path)


def _name(job: Job, text: str) -> Job:
    checked = Recipe.model_validate(job.recipe.model_dump() | {"name": text})
    return replace(job, name=checked.name)


ACCEPTING: dict[str, Place] = {
    "runs-dir": lambda job, text: replace(job, runs=Path(f"{job.folder}/runs/{text}")),
    "variable value": lambda job, text: _launch(job, environment={"A": text}),
    "python": _python,
}
"""Places where any text is a value."""
STRICT: dict[str, Place] = {
    "hostfile name": lambda job, text: replace(job, hosts=f"{text} slots=1\n"),
    "hostfile slots": lambda job, text: replace(job, hosts=f"n1 slots={text}\n"),
    "hostfile tail": lambda job, text: replace(job, hosts=f"n1 slots=1 {text}\n"),
    "variable name": lambda job, text: _launch(job, environment={text: "1"}),
    "variable name with equals": lambda job, text: _launch(job, environment={f"A={text}": "1"}),
    "run name": _name,
    "ssh user": lambda job, text: _ssh(job, user=text),
    "ssh port": lambda job, text: _ssh(job, port=text),
    "interface": lambda job, text: _launch(job, interface=text),
    "partition": lambda job, text: _slurm(job, partition=text),
    "account": lambda job, text: _slurm(job, account=text),
    "qos": lambda job, text: _slurm(job, qos=text),
    "constraint": lambda job, text: _slurm(job, constraint=text),
    "time": lambda job, text: _slurm(job, time=text),
    "extra": lambda job, text: _slurm(job, extra=[text]),
    "extra value": lambda job, text: _slurm(job, extra=[f"--gres={text}"]),
}
"""Places with an alphabet of their own."""
