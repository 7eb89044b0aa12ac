"""Slurm: one readable batch script for each stage, and inside its allocation one agent on each node by srun."""

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogview2.launch import launchers, local, preflight, probe, requeue
from cogview2.launch.job import PRIVATE_MODE, Command, Host, JobSpec, is_host_name
from cogview2.launch.slurm_script import asks_cpus, batch_script, nodes_used
from cogview2.pipeline import fsops
from cogview2.pipeline.attempt import redacted
from cogview2.pipeline.command_line import printable
from cogview2.pipeline.config.stages import STAGES, Recipe
from cogview2.pipeline.errors import LaunchError
from cogview2.pipeline.run_dir import RunDirectory, units

_JOB_ID = re.compile(r"(\d+)(;[A-Za-z0-9_.-]+)?")
_LOOK_SECONDS = 120.0
_FIRST_DERIVED_PORT, _DERIVED_PORTS = 20_000, 12_000


def submit(run: RunDirectory, recipe: Recipe, stages: tuple[str, ...], *, dry_run: bool = False) -> list[str]:
    """Write RUN/submit/NN-STAGE.sbatch for every stage, give them to sbatch as a chain, and say how to watch.

    Stages at the beginning that are done are left out. The run directory exists and holds the recipe, except for a
    dry run, which writes nothing and prints the scripts.

    Returns:
        The job ids, in the order of the stages.

    Raises:
        LaunchError: there is no sbatch, or it refuses; jobs that it had taken by then stay, and are named.
    """
    stages = _left_to_do(run, recipe, stages)
    texts = {stage: batch_script(run.path, recipe, stage) for stage in stages}
    paths = {
        stage: run.path / "submit" / f"{list(STAGES).index(stage) + 1:02d}-{stage}.sbatch" for stage in stages
    }
    if dry_run:
        _print_plan(run, recipe, texts, paths)
        return []
    if not stages:
        print(f"nothing to submit: every stage asked for is done in {run.path}")
        return []
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch is not on the PATH; submit from a login node of the cluster, or use another --launcher"
        )
    fsops.make_dirs(run.path / "submit")
    nodes = recipe.launch.slurm.nodes
    ids: list[str] = []
    for stage, text in texts.items():
        fsops.write_text(paths[stage], text)
        requeue.remember(run, stage)
        ids.append(_sbatch(_sbatch_argv(paths[stage], ids[-1] if ids else None), ids))
        after = f" after job {ids[-2]}" if len(ids) > 1 else ""
        part = "" if (used := nodes_used(recipe, stage)) == nodes else f" on {used} of {nodes} nodes"
        print(f"{stage}: job {ids[-1]}{after}{part}, {paths[stage]}")
    print(f"watch:  squeue --jobs={','.join(ids)}   cogview2 status {shlex.quote(str(run.path))}")
    print(f"logs:   {run.path}/submit/STAGE-JOB.log   cogview2 logs {shlex.quote(str(run.path))}")
    print(
        "stop:   scancel --batch --signal=TERM JOB saves first; scancel JOB gives it Slurm's KillWait to do so"
    )
    return ids


def _left_to_do(run: RunDirectory, recipe: Recipe, stages: tuple[str, ...]) -> tuple[str, ...]:
    for index, stage in enumerate(stages):
        done = run.exists() and run.is_done(stage)
        if not done or any(run.stage(u).is_stale(run.fingerprint(recipe, u)) for u in units(stage)):
            return stages[index:]
        print(f"{stage}: done before, with the same inputs and settings")
    return ()


def _sbatch_argv(path: Path, after: str | None) -> list[str]:
    return ["sbatch", "--parsable", *([f"--dependency=afterok:{after}"] if after else []), str(path)]


def _sbatch(argv: list[str], before: list[str]) -> str:
    """Run sbatch and return the job id that it prints."""
    result = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    match = _JOB_ID.fullmatch(result.stdout.strip())
    if result.returncode == 0 and match is not None:
        return match[1]
    words = " ".join((result.stderr or result.stdout).split()) or f"exit code {result.returncode}"
    kept = f" (jobs {', '.join(before)} are in the queue: scancel {' '.join(before)})" if before else ""
    raise LaunchError(
        f"sbatch did not take {argv[-1]}: {words}{kept}; correct launch.slurm in the recipe, or --set it"
    )


def _print_plan(
    run: RunDirectory, recipe: Recipe, texts: Mapping[str, str], paths: Mapping[str, Path]
) -> None:
    """Print what a submission would write and start; the names of the nodes are Slurm's to choose."""
    launcher = SlurmLauncher()
    after: str | None = None
    for stage, text in texts.items():
        print(f"# {paths[stage]}\n{text}")
        print(f"# submitted as:\n{shlex.join(_sbatch_argv(paths[stage], after))}\n")
        latest = run.stage(stage).latest_attempt()
        spec = JobSpec(
            stage=stage,
            run=run.path,
            attempt=latest.number + 1 if latest else 1,
            hosts=tuple(
                Host(f"node-{k}", recipe.launch.ranks_per_node) for k in range(nodes_used(recipe, stage))
            ),
            master_addr="node-0",
            master_port=0,
            environment=launchers.variables(recipe.launch, cpu=launcher.uses_cpu(recipe)),
        )
        for command in launcher.commands(spec):
            print(f"# its driver starts, once for all {len(spec.hosts)} nodes:\n{shlex.join(command.argv)}")
        print("# variables of the ranks, on top of what Slurm gives them:")
        for name, value in redacted(spec.environment).items():
            print(f"{name}={shlex.quote(value)}")
        print()
        after = f"JOB_OF_{stage}"


def _srun(nodes: int, cpus: int) -> list[str]:
    """Return srun's words for one task on each node.

    srun does not take the CPUs from sbatch (Slurm 22.05 and later): without the option a task gets one.
    """
    words = [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cpus}",
    ]
    return [*words, "--kill-on-bad-exit=0", "--mpi=none", "--export=ALL"]


def _look(nodes: list[str], run: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Return node -> what the probe says there (a node that says nothing is left out), and srun's last words."""
    token = secrets.token_hex(8)
    words = [
        "-P",
        "-m",
        "cogview2.launch.probe",
        "--run-dir",
        str(run),
        "--token",
        token,
        "--first",
        nodes[0],
    ]
    fsops.write_text(probe.token_path(run, token), "", durable=False, mode=PRIVATE_MODE)
    try:
        done = subprocess.run(
            [*_srun(len(nodes), 1), sys.executable, *words],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_LOOK_SECONDS,
            check=False,
        )
        printed, complaint = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        printed, complaint = late.stdout or b"", f"no answer within {_LOOK_SECONDS:.0f} s".encode()
    finally:
        probe.token_path(run, token).unlink(missing_ok=True)
    said: dict[str, dict[str, Any]] = {}
    for line in printed.decode("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            facts = json.loads(line.removeprefix(probe.MARK)) if line.startswith(probe.MARK) else {}
            own = facts.get("slurm_name") or facts["hostname"]
            said |= {name: facts for name in nodes if _short(name) == _short(own)}
    lines = [line.strip() for line in complaint.decode("utf-8", "replace").splitlines() if line.strip()]
    return said, printable(lines[-1])[:200] if lines else "no message"


def _short(name: str) -> str:
    return name.partition(".")[0].lower()


class SlurmLauncher:
    """Inside an allocation: one srun that starts an agent on every node; the agents start DeepSpeed."""

    def __init__(self, name: str = "slurm", _hosts_file: Path | None = None) -> None:
        self.name = name

    def hosts(self, recipe: Recipe) -> tuple[Host, ...]:
        """Return the nodes of the allocation, with `launch.ranks_per_node` slots each.

        Raises:
            LaunchError: outside an allocation, or scontrol does not print host names.
        """
        return tuple(Host(name, recipe.launch.ranks_per_node) for name in self._nodes())

    @staticmethod
    def _nodes() -> list[str]:
        nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        if not nodes:
            raise LaunchError(
                "SLURM_JOB_NODELIST is not set, so this is no Slurm allocation; use cogview2 submit --launcher slurm"
            )
        argv = ["scontrol", "show", "hostnames", nodes]
        try:
            result = subprocess.run(
                argv, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.CalledProcessError) as error:
            words = getattr(error, "stderr", None) or str(error)
            raise LaunchError(
                f"scontrol cannot list the nodes of {nodes}: {' '.join(words.split())}; look at the job with squeue"
            ) from error
        names = result.stdout.splitlines()
        if not names or len(set(names)) < len(names) or not all(is_host_name(name) for name in names):
            raise LaunchError(
                f"scontrol show hostnames {nodes} printed {result.stdout[:200]!r}, not one host name a line; "
                "look at the job with squeue"
            )
        return names

    def uses_cpu(self, recipe: Recipe) -> bool:
        """Return whether the recipe asks Slurm for no GPUs."""
        return asks_cpus(recipe)

    def check(self, run: RunDirectory, recipe: Recipe) -> None:
        """Look at all nodes at once, by one srun; see `preflight.problems`.

        Raises:
            LaunchError: there is no srun, or some nodes cannot run the job; one message names all of them.
        """
        if shutil.which("srun") is None:
            raise LaunchError(
                "srun is not on the PATH of this node; use cogview2 submit with another --launcher"
            )
        nodes = self._nodes()
        said, complaint = _look(nodes, run.path)
        own = {"versions": probe.versions(), "source": probe.source_digest()}
        cpu = self.uses_cpu(recipe)
        silence = f"gave no answer to srun ({complaint}); look at it with sinfo"
        hosts = self.hosts(recipe)
        answers = [preflight.Answer(host, said.get(host.name), silence) for host in hosts]
        own_name = preflight.by_own_name(recipe.launch, cpu=cpu)
        bad = []
        for answer in answers:
            found = preflight.problems(answer, own, run.path, nodes[0], gpus=not cpu)
            found += preflight.shared_with(answer, answers, gpus=not cpu, own_name=own_name)
            bad += [f"  {answer.host.name}: {'; '.join(found)}"] if found else []
        if bad:
            first = f"{len(bad)} of {len(nodes)} nodes cannot run this job, nothing was started:"
            raise LaunchError("\n".join([first, *bad]))

    def rendezvous(self, recipe: Recipe) -> tuple[str, int]:
        """Return the first node, and a port that is free there; one made from the job's number, seen from elsewhere."""
        first = self._nodes()[0]
        if recipe.launch.master_port is not None:
            return first, recipe.launch.master_port
        if _short(first) == _short(socket.gethostname()):
            return first, local.free_port("")
        job = os.environ.get("SLURM_JOB_ID", "")
        return first, _FIRST_DERIVED_PORT + (int(job) if job.isdigit() else 0) % _DERIVED_PORTS

    def commands(self, spec: JobSpec) -> list[Command]:
        """Return the one srun. Slurm hands SIGUSR1 on to the agents; no value of a variable stands in the command."""
        threads = int(spec.environment.get("OMP_NUM_THREADS", "1"))
        argv = [*_srun(len(spec.hosts), spec.hosts[0].slots * threads), *spec.agent_argv("slurm")]
        return [Command(tuple(argv), local.current_environment(), "srun", "SIGUSR1")]
