"""Programs that launchers start, as small scripts on a PATH of their own: they run what they are given in the way of the
real ones, through a shell where those do, and write down what arrives at the far end."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SHELL = 'env -i PATH="$PATH" HOME="$HOME" FAKES="$FAKES" PYTHONPATH="$FAKES" bash -c'
"""As sshd: a clean environment, and the words joined and read by the login shell."""

PROGRAMS = {
    # Options up to `--`, then the host, then words for its shell.
    "ssh": f'while [ "$1" != -- ]; do shift; done; shift 2; exec {_SHELL} "$*"',
    # Words for the shells of all hosts, %n replaced; a host goes on when its connection ends (setsid).
    "pdsh": f"""printf '%s\\0' "$@" > "$FAKES/pdsh-$$.argv"
shift 4; IFS=, read -ra hosts <<< "$1"; shift
words="$*"
for k in "${{!hosts[@]}}"; do setsid {_SHELL} "${{words//%n/$k}}" & done
trap 'exit 1' INT TERM
wait; wait""",
    # Its options begin with --; the program is executed as it is, without a shell.
    "srun": 'while [[ "$1" == --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"',
    # Words before the program, `-x NAME` or `-genvlist A,B` among them; others of our variables stay here.
    "mpirun": """if [ "$1" = --version ]; then cat "$FAKES/mpirun-version"; exit; fi
printf '%s\\0' "$@" > "$FAKES/mpirun.argv"
names=()
while true; do case "$1" in
  -x) names+=("${2%%=*}"); case "$2" in *=*) export "$2";; esac; shift 2;;
  -genv) case "$2" in *=*) names+=("${2%%=*}"); export "$2"; shift 2;; *) names+=("$2"); export "$2=$3"; shift 3;; esac;;
  -genvlist) IFS=, read -ra names <<< "$2"; shift 2;;
  -n|-ppn|-hosts|-hostfile|--host|--map-by|--bind-to|-bind-to|-iface) shift 2;;
  --mca) shift 3;;
  *) break;;
esac; done
kept=("PATH=$PATH" "FAKES=$FAKES" PMI_RANK=0)
for name in "${names[@]}"; do kept+=("$name=${!name}"); done
env -i "${kept[@]}" bash -c 'exec "$@"' - "$@" &
trap 'kill -USR1 $!' USR1
wait; wait""",
    "sbatch": 'while [[ "$1" == --* ]]; do shift; done; bash "$1" > /dev/null; echo 7',
    "scontrol": "exit 0",
    "pkill": 'touch "$FAKES/pkill-was-called"',
    # The far end.
    # What is looked for comes last and whole: a payload may have sent this program into the background.
    "python": """n=$$; cat /proc/self/environ > "$FAKES/arrived-$n.env"; printf '%s\\0' "$0" "$@" > "$FAKES/new-$n.argv"
mv "$FAKES/new-$n.argv" "$FAKES/arrived-$n.argv"
""",
}


def program(folder: Path, name: str, text: str) -> None:
    """Put an executable bash script into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@dataclass(frozen=True)
class Arrived:
    """What a program at the far end was given."""

    argv: list[str]
    environment: dict[str, str]


class FakePrograms:
    """A folder with the programs."""

    def __init__(self, folder: Path, mpirun_version: str = "mpirun (Open MPI) 4.1.4") -> None:
        self.folder = folder
        self.binaries = folder / "bin"
        self.binaries.mkdir(parents=True)
        for name, text in PROGRAMS.items():
            self.program(name, text)
        (folder / "mpirun-version").write_text(mpirun_version)

    def program(self, name: str, text: str) -> Path:
        """Write one program."""
        path = self.binaries / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path

    @property
    def python(self) -> Path:
        """The far end."""
        return self.binaries / "python"

    @property
    def variables(self) -> dict[str, str]:
        """What a command must find in its environment to use them."""
        return {"PATH": f"{self.binaries}:/usr/bin:/bin", "FAKES": str(self.folder), "HOME": str(self.folder)}

    def run(self, argv: tuple[str, ...], environment: dict[str, str], limit: float = 20.0) -> int:
        """Execute a command in a folder of its own and return its exit code."""
        (self.folder / "cwd").mkdir(exist_ok=True)
        found = subprocess.run(
            argv,
            env={**environment, **self.variables},
            cwd=self.folder / "cwd",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=limit,
            check=False,
        )
        return found.returncode

    def arrived(self) -> list[Arrived]:
        """Return what has arrived at the far end since the last call."""
        found = []
        for path in sorted(self.folder.glob("arrived-*.argv")):
            argv = _words(path)
            pairs = [word.partition("=") for word in _words(path.with_suffix(".env"))]
            found.append(Arrived(argv, {name: value for name, _, value in pairs}))
            path.unlink()
            path.with_suffix(".env").unlink()
        return found


def _words(path: Path) -> list[str]:
    return [os.fsdecode(word) for word in path.read_bytes().split(b"\0")[:-1]]
