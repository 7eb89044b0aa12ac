"""A stage that starts in no time and does what RUN/mode says, and launchers that start it in place of DeepSpeed."""

import os
import sys

from cogview2.launch.job import Command, JobSpec
from cogview2.launch.launchers import LocalLauncher

# Stands in for a launched stage: rank 0 only, behaviour chosen by a file in the run directory.
FAKE_STAGE = """
import logging, pathlib, signal, sys, time
from cogview2.pipeline import logging as log_setup
from cogview2.pipeline.run_dir import RunDirectory, units
name, run, number = sys.argv[1], RunDirectory(pathlib.Path(sys.argv[2])), int(sys.argv[3])
stage = run.stage(name).create()
attempt = stage.attempt(number)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
attempt.write_pid(0)
log_setup.setup(rank=0, file=attempt.rank_log(0))
logging.getLogger("cogview2.fake").info("working on %s", name)
mode = (run.path / "mode").read_text() if (run.path / "mode").exists() else "good"
stage.write_heartbeat(5, 10, loss=2.5, throughput=1234.0, unit="tokens/s", eta_seconds=65)
if mode == "wait":
    while not stop:
        time.sleep(0.02)
    attempt.write_outcome(0, "preempted", 75, 5, "saved at step 5; the same command goes on from there")
    sys.exit(75)
if mode == "hang":
    import os
    if os.fork() == 0:  # rank 1, stuck where no signal is heeded
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        attempt.write_pid(1)
        time.sleep(60)
    attempt.write_outcome(0, "hang", 76, 5, "rank 1 (host a, process 7) is silent, in phase step of step 5")
    os.wait()
if mode == "peers":
    signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
    attempt.write_outcome(0, "numeric", 70, 5, "loss is nan")
    deadline = time.monotonic() + 20
    while not stop and time.monotonic() < deadline:
        time.sleep(0.02)
    attempt.write_outcome(1, "preempted", 75, 5, "saved" if stop else "nobody said stop")
    sys.exit(1)
if mode == "late" and name == "train_tokenizer":
    while not stop:
        time.sleep(0.02)
if mode.startswith("fail"):
    attempt.write_outcome(0, "numeric", int(mode[4:]), 5, "loss is nan")
    sys.exit(1)
if mode == "silent":
    sys.exit(0)
recipe = run.load_recipe()
for unit in units(name):
    folder = run.stage(unit).create()
    (folder.output / "made.txt").write_text(f"{name} {recipe.seed}")
    said = {"summary": [f"weights {recipe.evaluate.weights}", f"captions {recipe.evaluate.captions}"]}
    extra = said if name == "evaluate" else {"loss": 1.5}
    folder.write_done(run.inputs(unit, recipe), folder.output_files(), run.fingerprint(recipe, unit), extra)
stage.write_heartbeat(10, 10, loss=1.5)
attempt.write_outcome(0, "done", 0, 10, "")
sys.exit(3 if mode == "badcode" else 0)
"""


class FakeLauncher(LocalLauncher):
    def commands(self, spec: JobSpec) -> list[Command]:
        argv = (sys.executable, "-c", FAKE_STAGE, spec.stage, str(spec.run), str(spec.attempt))
        return [Command(argv, os.environ, "local", "ranks")]


class OneCommand(FakeLauncher):
    """Like srun or mpirun: one command for the ranks of all hosts, which hands SIGUSR1 on."""

    def commands(self, spec: JobSpec) -> list[Command]:
        return [Command(super().commands(spec)[0].argv, os.environ, "mpirun", "SIGUSR1")]
