"""Whether the memory of the hosts holds a copy of what their ranks train."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cogview2.pipeline.fsops import byte_words

_MARGIN = 1.25
"""So many times the copies must be available: training goes on beside them, and what is written passes through memory too."""
_NO_LIMIT = 1 << 60
"""Version 1 of the control groups says "no limit" by a number near 2^63."""


class Need(NamedTuple):
    """What one rank wants to copy, and what it sees of its host."""

    host: str
    size: int
    """Bytes."""
    available: int | None
    """Bytes; None where the system does not tell."""


def lack(needs: Sequence[Need]) -> str | None:
    """Return why the copies of all ranks do not fit, or None when they do; the same on all ranks that give it the same.

    Ranks of one host share its memory. What is not known is believed to be enough.
    """
    for host in dict.fromkeys(need.host for need in needs):
        ranks = [need for need in needs if need.host == host]
        size = sum(need.size for need in ranks)
        available = min((need.available for need in ranks if need.available is not None), default=None)
        if available is not None and size * _MARGIN > available:
            return (
                f"a copy of the state of the {len(ranks)} rank{'s' * (len(ranks) > 1)} on {host} takes {byte_words(size)}, "
                f"of which {_MARGIN:g} times must be available there, and {byte_words(available)} are; give the job more memory, "
                "run fewer ranks on a host, or set train.checkpoint.asynchronous to false"
            )
    return None


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return how much memory this process may still take without swapping, or None where the system does not tell.

    It is the least of what the kernel has and of what the limits of the control groups (versions 1 and 2) leave.

    Args:
        root: where proc/ and sys/ are.
    """
    return min(
        (found for found in (_of_the_kernel(root), *_of_the_groups(root)) if found is not None), default=None
    )


def _of_the_kernel(root: Path) -> int | None:
    kilobytes = _fields(root / "proc" / "meminfo").get("MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _of_the_groups(root: Path) -> Iterator[int | None]:
    """Yield what each control group around this process leaves."""
    base = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # In a container the path may be that of the host, and what is mounted the container's own: all levels are tried.
        levels = [path.strip("/"), *(str(level) for level in Path(path.strip("/")).parents)]
        for level in dict.fromkeys(levels):
            if not controllers:
                yield _left(base / level, "memory.max", "memory.current", "")
            elif "memory" in controllers.split(","):
                group = base / "memory" / level
                yield _left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _left(group: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Return what a group leaves, files that the kernel may drop from memory included; None without a limit."""
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None or most >= _NO_LIMIT:
        return None
    fields = _fields(group / "memory.stat")
    cache = sum(fields.get(prefix + kind, 0) for kind in ("inactive_file", "active_file"))
    return max(0, most - used + cache)


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is none, as for `max`."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, int]:
    """Return the first number behind each word that begins a line; nothing where the file is not there."""
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
