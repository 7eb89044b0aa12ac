"""One try of a stage: the files by which ranks and launcher know of each other, attempts/NNNN/."""

import contextlib
import json
import os
import re
import shlex
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cogview2.pipeline import fsops

_SECRET_MARKS = ("TOKEN", "KEY", "SECRET", "PASS", "CREDENTIAL", "AUTH", "PWD")
_NO_SECRETS = frozenset({"TOKENIZERS_PARALLELISM", "PWD", "OLDPWD"})
_LOGIN_IN_URL = re.compile(r"//[^/@\s]+@")
_REDACTED = "(redacted)"
PROBE_PREFIX = ".probe-"
"""Begins the name of the file by which hosts show that they see a run directory."""
KILLED = "killed"
"""Reason in a record that a rank could not write itself."""
HUNG = "hang"
"""Reason in the records of ranks that left a job because it hung; their code is 76."""
LOST = "lost_peer"
"""Reason in the record of a rank whose collective ended because another one had failed; its code is 1."""
STOPPED = "stopped"
"""Reason in an agent's record of a rank that had not begun when its job was told to stop; its code is 75."""
_NOTICE_SECONDS = 2.0
"""A killed rank is noticed later than its peers notice the closed connection."""


_noted: list[int] = []


def note_step(step: int) -> None:
    """Remember the step (from 1) that this process works at, for the record of its end."""
    _noted[:] = [step]


def noted_step() -> int | None:
    """Return the step that this process works at, or None where there are no steps."""
    return _noted[0] if _noted else None


@dataclass(frozen=True)
class Outcome:
    """Why a rank left, in its own words."""

    rank: int
    reason: str
    code: int
    step: int | None
    message: str
    time: float
    host: str = ""
    """The machine's own name for itself."""


@dataclass(frozen=True)
class Beat:
    """What the watchdog of a running rank writes every second or two."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int | None
    count: int
    """Grows with every sign of progress."""
    since: float
    """When it last made progress, seconds since 1970 by the clock of its host."""
    time: float
    """When this was written, by the same clock."""

    @property
    def place(self) -> str:
        """Where the rank is in its work, in words: `phase step of step 7`."""
        return f"phase {self.phase}" + ("" if self.step is None else f" of step {self.step}")

    @property
    def name(self) -> str:
        """Who it is, in words: `rank 1 (host node2, process 4711)`."""
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


class Attempt:
    """The folder attempts/NNNN/ of one stage."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def number(self) -> int:
        """1 for the first attempt."""
        return int(self.path.name)

    @property
    def launcher_log(self) -> Path:
        """Standard output and error of the launcher and of all ranks."""
        return self.path / "launcher.log"

    def host_log(self, host: str) -> Path:
        """Return the log of what a host's agent and the ranks below it print."""
        return self.path / f"host-{host}.log"

    def host_logs(self) -> list[Path]:
        """Return the logs of hosts that exist, sorted by name."""
        return sorted(self.path.glob("host-*.log"))

    def rank_log(self, rank: int) -> Path:
        """Return the log that the rank writes itself."""
        return self.path / f"rank-{rank}.log"

    def rank_logs(self) -> dict[int, Path]:
        """Return the logs that exist: rank -> file."""
        found = {int(path.stem.removeprefix("rank-")): path for path in self.path.glob("rank-*.log")}
        return dict(sorted(found.items()))

    def write_commands(self, argvs: Sequence[Sequence[str]], environment: Mapping[str, str]) -> None:
        """Record what was started: command.txt (a shell line each) and env.json without secrets."""
        lines = [shlex.join(argv) + "\n" for argv in argvs]
        fsops.write_text(self.path / "command.txt", "".join(lines))
        fsops.write_json(self.path / "env.json", redacted(environment))

    def write_pid(self, rank: int) -> None:
        """Called by a rank first of all: from now on signals reach it."""
        fsops.write_text(self.path / f"rank-{rank}.pid", f"{os.getpid()}\n", durable=False)

    def pids(self, ranks: Collection[int] | None = None) -> dict[int, int]:
        """Return rank -> process id of those of `ranks` that have started; on their own host a process id means something.

        None asks for all ranks.
        """
        if ranks is None:
            ranks = [int(path.stem.removeprefix("rank-")) for path in self.path.glob("rank-*.pid")]
        found: dict[int, int] = {}
        for rank in sorted(ranks):
            with contextlib.suppress(FileNotFoundError, ValueError):
                found[rank] = int((self.path / f"rank-{rank}.pid").read_text(encoding="utf-8"))
        return found

    def write_beat(self, beat: Beat) -> None:
        """Replace the heartbeat of a rank, beats/rank_K.json; raises OSError.

        Not through fsops: it is worthless seconds later, and no fault point and no journal of a test counts it.
        """
        path = self._beats / f"rank_{beat.rank}.json"
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
        os.replace(temporary, path)

    def beat(self, rank: int) -> Beat | None:
        """Return the newest heartbeat of a rank, or None; an unreadable one counts as none."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Beat(**json.loads((self._beats / f"rank_{rank}.json").read_text(encoding="utf-8")))
        return None

    def beats(self) -> dict[int, Beat]:
        """Return rank -> newest heartbeat of the ranks that ever wrote one."""
        names = [path.stem.removeprefix("rank_") for path in self._beats.glob("rank_*.json")]
        found = {int(name): self.beat(int(name)) for name in names if name.isdigit()}
        return {rank: beat for rank, beat in sorted(found.items()) if beat is not None}

    @property
    def _beats(self) -> Path:
        return self.path / "beats"

    def prepare_beats(self) -> None:
        """Make the folders of heartbeats and stacks; existing ones are fine."""
        fsops.make_dirs(self._beats)
        fsops.make_dirs(self.stacks(0).parent)

    def stacks(self, rank: int) -> Path:
        """Return where a rank of a job that hangs writes what its threads are doing; empty unless it did."""
        return self.path / "stacks" / f"rank_{rank}.txt"

    @property
    def hang_path(self) -> Path:
        """hang.json: what the first rank that noticed a hang says to the others."""
        return self.path / "hang.json"

    def write_hang(self, rank: int, message: str) -> None:
        """Write hang.json unless there is one; raises OSError. Not through fsops, see `write_beat`."""
        if self.hang_path.exists():
            return
        temporary = self.hang_path.with_name(f".tmp.{self.hang_path.name}.{os.getpid()}")
        temporary.write_text(
            json.dumps({"rank": rank, "message": message, "time": time.time()}), encoding="utf-8"
        )
        os.replace(temporary, self.hang_path)

    @property
    def stop_path(self) -> Path:
        """stop-requested: which signal asked which rank to stop; all ranks of the attempt heed it."""
        return self.path / "stop-requested"

    @property
    def progress_path(self) -> Path:
        """progress.json: what the stage had kept when this attempt began."""
        return self.path / "progress.json"

    def write_outcome(
        self, rank: int, reason: str, code: int, step: int | None, message: str, at: float | None = None
    ) -> None:
        """Called by a rank last of all. `reason` is one word, `code` an ExitCode, `message` one sentence.

        `at` is when it happened, seconds since 1970, for whoever writes it later in the rank's place.
        """
        when = time.time() if at is None else at
        outcome = Outcome(rank, reason, int(code), step, message, when, socket.gethostname())
        fsops.write_json(self.path / f"outcome-rank-{rank}.json", asdict(outcome))

    def outcome(self, rank: int) -> Outcome | None:
        """Return what a rank left, or None; an unreadable record counts as none."""
        path = self.path / f"outcome-rank-{rank}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return Outcome(
                rank=int(content["rank"]),
                reason=str(content["reason"]),
                code=int(content["code"]),
                step=content.get("step"),
                message=str(content.get("message", "")),
                time=float(content.get("time", path.stat().st_mtime)),
                host=str(content.get("host", "")),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def outcomes(self) -> list[Outcome]:
        """Return the outcomes that were written, first in time first; an unreadable one counts as none."""
        names = [path.stem.removeprefix("outcome-rank-") for path in self.path.glob("outcome-rank-*.json")]
        found = [self.outcome(int(name)) for name in names if name.isdigit()]
        return sorted(
            (outcome for outcome in found if outcome is not None),
            key=lambda outcome: (outcome.time, outcome.rank),
        )

    def write_result(self, returncode: int, seconds: float) -> None:
        """Called by the launcher when all processes are gone: how the job ended and how long it took."""
        fsops.write_json(self.path / "result.json", {"returncode": returncode, "seconds": seconds})

    def seconds(self) -> float | None:
        """Return how long the attempt took, or None while it runs or when its launcher was killed."""
        try:
            return float(json.loads((self.path / "result.json").read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def first_failure(self) -> Outcome | None:
        """Return the earliest outcome that is not a success: the others usually follow from it.

        Clocks of hosts differ: a rank that says itself that another one failed before is never the first.
        """
        failures = [outcome for outcome in self.outcomes() if outcome.code != 0]
        return min(
            failures,
            key=lambda outcome: (
                outcome.reason == LOST,
                outcome.time - (_NOTICE_SECONDS if outcome.reason == KILLED else 0.0),
            ),
            default=None,
        )


def redacted(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment, sorted, with the values of secret-looking names replaced."""
    return {
        name: _REDACTED if _is_secret(name) else _LOGIN_IN_URL.sub(f"//{_REDACTED}@", value)
        for name, value in sorted(environment.items())
    }


def _is_secret(name: str) -> bool:
    return name not in _NO_SECRETS and any(mark in name.upper() for mark in _SECRET_MARKS)
