"""One try of a stage: the files by which ranks and launcher know of each other, attempts/NNNN/."""

import json
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cogview2.pipeline import fsops

_SECRET_MARKS = ("TOKEN", "KEY", "SECRET", "PASS")
_REDACTED = "(redacted)"


@dataclass(frozen=True)
class Outcome:
    """Why a rank left, in its own words."""

    rank: int
    reason: str
    code: int
    step: int | None
    message: str
    time: float


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

    def rank_log(self, rank: int) -> Path:
        """Return the log that the rank writes itself."""
        return self.path / f"rank-{rank}.log"

    def rank_logs(self) -> dict[int, Path]:
        """Return the logs that exist: rank -> file."""
        found = {int(path.stem.removeprefix("rank-")): path for path in self.path.glob("rank-*.log")}
        return dict(sorted(found.items()))

    def write_command(self, argv: list[str], environment: Mapping[str, str]) -> None:
        """Record what was started: command.txt (one shell line) and env.json without secrets."""
        fsops.write_text(self.path / "command.txt", shlex.join(argv) + "\n")
        fsops.write_json(self.path / "env.json", redacted(environment))

    def write_pid(self, rank: int) -> None:
        """Called by a rank first of all: from now on signals reach it."""
        fsops.write_text(self.path / f"rank-{rank}.pid", f"{os.getpid()}\n", durable=False)

    def pids(self) -> dict[int, int]:
        """Return rank -> process id of the ranks that have started."""
        found: dict[int, int] = {}
        for path in self.path.glob("rank-*.pid"):
            text = path.read_text(encoding="utf-8").strip()
            if text.isdigit():
                found[int(path.stem.removeprefix("rank-"))] = int(text)
        return dict(sorted(found.items()))

    def write_outcome(self, rank: int, reason: str, code: int, step: int | None, message: str) -> None:
        """Called by a rank last of all. `reason` is one word, `code` an ExitCode, `message` one sentence."""
        outcome = Outcome(rank, reason, int(code), step, message, time.time())
        fsops.write_json(self.path / f"outcome-rank-{rank}.json", asdict(outcome))

    def outcomes(self) -> list[Outcome]:
        """Return the outcomes that were written, first in time first; an unreadable one counts as none."""
        found: list[Outcome] = []
        for path in self.path.glob("outcome-rank-*.json"):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                found.append(
                    Outcome(
                        rank=int(content["rank"]),
                        reason=str(content["reason"]),
                        code=int(content["code"]),
                        step=content.get("step"),
                        message=str(content.get("message", "")),
                        time=float(content.get("time", path.stat().st_mtime)),
                    )
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return sorted(found, key=lambda outcome: (outcome.time, outcome.rank))

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
        """Return the earliest outcome that is not a success: the others usually follow from it."""
        return next((outcome for outcome in self.outcomes() if outcome.code != 0), None)


def redacted(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment, sorted, with the values of secret-looking names replaced."""
    return {
        name: _REDACTED if any(mark in name.upper() for mark in _SECRET_MARKS) else value
        for name, value in sorted(environment.items())
    }
