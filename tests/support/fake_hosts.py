"""Hosts without a network: an `ssh` that runs the command here, through a shell, as sshd does; and a DeepSpeed that starts
ranks without torch. What a rank does is written in RUN/mode and RUN/mode-RANK."""

import os
import sys
from pathlib import Path

SSH = """#!{python}
import json, os, pathlib, subprocess, sys
folder = pathlib.Path({folder!r})
words = sys.argv[1:]
cut = words.index("--")
host, command = words[cut + 1], " ".join(words[cut + 2 :])
with open(folder / "calls", "a") as file:
    file.write(json.dumps([words[:cut], host, command]) + "\\n")
behaviour = folder / host
said = behaviour.read_text() if behaviour.exists() else ""
if said == "unreachable":
    print(f"ssh: connect to host {{host}} port 22: No route to host", file=sys.stderr)
    sys.exit(255)
environment = {{"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(folder), "HOST": host}}
environment |= {{"WORLD_SIZE": "7", "LOCAL_RANK": "5", "OMPI_COMM_WORLD_RANK": "3"}}
if said.startswith("instead "):
    command = said.removeprefix("instead ")
elif said:
    command = said + "\\n" + command
remote = subprocess.Popen(["bash", "-c", command], env=environment, start_new_session=True)
(folder / f"{{host}}.pid").write_text(str(remote.pid))
code = remote.wait()
sys.exit(255 if code < 0 else code)
"""

RUNNER = """
import argparse, os, pathlib, subprocess, sys, time
parser = argparse.ArgumentParser()
for name in ("--hostfile", "--node_rank", "--master_addr", "--master_port", "--run-dir", "--attempt", "--module"):
    parser.add_argument(name, required=True)
for name in ("--no_ssh", "--no_local_rank"):
    parser.add_argument(name, action="store_true", required=True)
asked = parser.parse_args()
lines = [line.split() for line in pathlib.Path(asked.hostfile).read_text().splitlines()]
slots = [int(line[1].removeprefix("slots=")) for line in lines]
node = int(asked.node_rank)
first = sum(slots[:node])
rank = str(pathlib.Path(__file__).with_name("rank.py"))
ranks = []
if not (pathlib.Path(asked.run_dir) / f"no-ranks-{node}").exists():
    for number in range(first, first + slots[node]):
        environment = dict(os.environ, RANK=str(number), MASTER_ADDR=asked.master_addr, MASTER_PORT=asked.master_port)
        words = [sys.executable, rank, asked.module.rpartition(".")[2], asked.run_dir, asked.attempt]
        ranks.append(subprocess.Popen(words, env=environment))
while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
    time.sleep(0.05)
for process in ranks:  # like DeepSpeed's: one that fails takes the others of its host along
    if process.poll() is None:
        process.terminate()
sys.exit(max([abs(process.wait()) for process in ranks] or [3]))
"""

RANK = """
import json, os, pathlib, signal, sys, time
from cogview2.pipeline.run_dir import RunDirectory, units
name, run, number = sys.argv[1], RunDirectory(pathlib.Path(sys.argv[2])), int(sys.argv[3])
rank = int(os.environ["RANK"])
stage = run.stage(name).create()
attempt = stage.attempt(number)
stop = []
mode = run.path / f"mode-{rank}"
mode = mode if mode.exists() else run.path / "mode"
mode = mode.read_text() if mode.exists() else "good"
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else lambda *_: stop.append(1))
attempt.write_pid(rank)
(run.path / f"env-{rank}.json").write_text(json.dumps(dict(os.environ)))
print("rank", rank, "begins", flush=True)
if mode in ("wait", "stubborn"):
    while not stop:
        time.sleep(0.02)
    attempt.write_outcome(rank, "preempted", 75, 5, "saved at step 5; the same command goes on from there")
    sys.exit(75)
if mode == "fail":
    attempt.write_outcome(rank, "NumericError", 70, 17, "the loss of step 17 is nan")
    sys.exit(70)
if mode == "vanish":
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "peer":
    while attempt.outcome(3) is None:
        time.sleep(0.02)
    attempt.write_outcome(rank, "RuntimeError", 1, 17, "connection closed by peer")
    sys.exit(1)
if mode == "never":
    time.sleep(600)
if rank == 0:
    recipe = run.load_recipe()
    for unit in units(name):
        folder = run.stage(unit).create()
        (folder.output / "made.txt").write_text(name)
        folder.write_done(run.inputs(unit, recipe), folder.output_files(), run.fingerprint(recipe, unit))
attempt.write_outcome(rank, "done", 0, 10, "")
"""


class FakeHosts:
    """A folder with a fake `ssh` and a fake DeepSpeed; two hosts of two ranks each by default."""

    def __init__(self, folder: Path, names: tuple[str, ...] = ("127.0.0.1", "127.0.0.2")) -> None:
        self.folder = folder
        self.names = names
        binaries = folder / "bin"
        launcher = folder / "deepspeed" / "launcher"
        for made in (binaries, launcher):
            made.mkdir(parents=True)
        (binaries / "ssh").write_text(SSH.format(python=sys.executable, folder=str(folder)))
        (binaries / "ssh").chmod(0o755)
        for path in (launcher.parent / "__init__.py", launcher / "__init__.py"):
            path.touch()
        (launcher / "runner.py").write_text(RUNNER)
        (launcher / "rank.py").write_text(RANK)
        self.file = folder / "hosts"
        self.file.write_text("".join(f"{name} slots=2\n" for name in names))

    @property
    def path(self) -> str:
        """PATH with the fake ssh in front."""
        return f"{self.folder / 'bin'}:{os.environ['PATH']}"

    def behave(self, host: str, said: str) -> None:
        """`unreachable`; `instead COMMAND`, run in place of every command; or words put in front of every command."""
        (self.folder / host).write_text(said)

    def calls(self) -> list[str]:
        """Return the fake ssh's calls so far, a line of JSON each: options, host, command."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []
