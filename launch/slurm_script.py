"""The batch script of one stage for Slurm, as people would write it."""

import shlex
import sys
from pathlib import Path

from cogview2.launch.quoting import require_line, sbatch_word
from cogview2.pipeline.config.stages import STAGES, Recipe
from cogview2.pipeline.config.units import hosts_used
from cogview2.pipeline.errors import ConfigError, ExitCode, LaunchError

_OURS = (
    *("array", "cpus-per-task", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "requeue", "no-requeue", "signal", "time", "wrap"),
)
"""Options of sbatch that mean something to the script itself, so that launch.slurm.extra may not set them."""

_SCRIPT = """\
#!/bin/bash
{directives}

# Stage {stage} of one run, written by `cogview2 submit --launcher slurm`; `sbatch` takes this file again as it is.
python={python}
run={run}
stage={stage}

# Slurm sends USR1 {seconds} s before the time limit (--signal above), TERM when the job is cancelled or preempted.
# Either is handed to the driver, which asks the ranks to save and leave.
driver=
asked=
cancelled=no
hand_on() {{
    interrupted=yes
    asked="$1"
    if [ -n "$driver" ]; then kill -s "$1" "$driver" 2>/dev/null; fi
}}
trap 'hand_on USR1' USR1
trap 'cancelled=yes; hand_on TERM' TERM

# The driver starts one agent on every node with srun and believes only the stage's DONE record.
"$python" -P -m cogview2.launch.cli run "$run/recipe.yaml" --name {name} --runs-dir {runs} \\
    --stages "$stage" --launcher slurm &
driver=$!
if [ -n "$asked" ]; then kill -s "$asked" "$driver" 2>/dev/null; fi

# A trapped signal ends `wait` as well: wait again until the driver itself has ended.
while :; do
    interrupted=no
    wait "$driver"
    code=$?
    if [ "$interrupted" = no ]; then break; fi
done

# {requeue}: stopped with its work saved. Back into the queue, unless it was cancelled or nothing was gained;
# jobs that wait for this one (--dependency) then wait on.
if [ "$code" -eq {requeue} ] && [ "$cancelled" = no ]; then
    if "$python" -P -m cogview2.launch.requeue --run-dir "$run" --stage "$stage" \\
        --restarts "${{SLURM_RESTART_COUNT:-0}}" --limit {limit}; then
        scontrol requeue "$SLURM_JOB_ID" || echo "cogview2: requeue job $SLURM_JOB_ID by hand, or submit again"
    fi
fi
exit "$code"
"""


def asks_cpus(recipe: Recipe) -> bool:
    """Return whether the recipe asks Slurm for no GPUs."""
    slurm, environment = recipe.launch.slurm, recipe.launch.environment
    asked = slurm.gpus or any(word.startswith(("--gres=gpu", "--gpus")) for word in slurm.extra)
    return not asked or environment.get("DS_ACCELERATOR") == "cpu"


def nodes_used(recipe: Recipe, stage: str) -> int:
    """Return how many of `launch.slurm.nodes` a stage runs on; see `hosts_used`."""
    slots = [recipe.launch.ranks_per_node] * recipe.launch.slurm.nodes
    return hosts_used(recipe, stage, slots, cpu=asks_cpus(recipe))


def _directives(run: Path, recipe: Recipe, stage: str, workdir: Path) -> list[str]:
    launch, slurm = recipe.launch, recipe.launch.slurm
    log = str(run / "submit" / stage).replace("%", "%%") + "-%j.log"
    if "\\" in log:
        raise LaunchError(f"Slurm writes no log to {run}, a path with a backslash; choose another --runs-dir")
    for option in slurm.extra:
        # sbatch takes any beginning of an option's name for the whole.
        if any(own.startswith(option.removeprefix("--").partition("=")[0]) for own in _OURS):
            raise ConfigError(
                f"launch.slurm.extra {option}: the batch script sets that option itself; remove it"
            )
    optional = {
        "gpus-per-node": str(launch.ranks_per_node) if slurm.gpus else None,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
    }
    return [
        f"--job-name=cogview2-{recipe.name}-{stage}",
        f"--nodes={nodes_used(recipe, stage)}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={launch.ranks_per_node * launch.threads_per_rank}",
        *(f"--{name}={value}" for name, value in optional.items() if value is not None),
        f"--time={slurm.time}",
        f"--signal=B:USR1@{slurm.signal_seconds}",
        "--requeue",
        "--kill-on-invalid-dep=yes",
        "--open-mode=append",
        f"--output={log}",
        f"--chdir={workdir}",
        *slurm.extra,
    ]


def batch_script(
    run: Path, recipe: Recipe, stage: str, *, python: str = sys.executable, workdir: Path | None = None
) -> str:
    """Return the text for sbatch of one stage.

    Args:
        run: the run directory; its last name is the run's name.
        recipe: the run's recipe; `launch` says how many nodes of what kind.
        stage: a stage's name.
        python: the interpreter, under a path that every node sees.
        workdir: where the job starts, so that relative paths of a recipe mean there what they mean here; by default
            the working directory.

    Raises:
        LaunchError: a path that no line of a script can hold.
        ConfigError: `launch.slurm.extra` names an option that the script sets, or the stage is none, or it can run on no
            part of the nodes.
    """
    if stage not in STAGES:
        raise ConfigError(f"{stage!r} is no stage; the stages are {', '.join(STAGES)}")
    workdir = Path.cwd() if workdir is None else workdir
    for what, text in (("run directory", str(run)), ("Python", python), ("working directory", str(workdir))):
        require_line(text, what)
    directives = [f"#SBATCH {_directive(word)}" for word in _directives(run, recipe, stage, workdir)]
    return _SCRIPT.format(
        directives="\n".join(directives),
        python=shlex.quote(python),
        run=shlex.quote(str(run)),
        runs=shlex.quote(str(run.parent)),
        name=shlex.quote(run.name),
        stage=shlex.quote(stage),
        seconds=recipe.launch.slurm.signal_seconds,
        requeue=int(ExitCode.REQUEUE),
        limit=recipe.launch.slurm.max_requeues,
    )


def _directive(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{name}{equals}{sbatch_word(value)}"
