"""The list of hosts that a person writes: `NAME slots=N` a line, read strictly, since ssh reads it next."""

import re
from pathlib import Path

from cogview2.launch.job import MAX_SLOTS, Host, is_host_name
from cogview2.pipeline.errors import ConfigError

_LINE = re.compile(r"(?P<name>\S+)[ \t]+slots=(?P<slots>[0-9]{1,9})")
_MAX_BYTES = 1 << 20
_FORM = "write one host a line, for example `node1 slots=8`"


def read_hostfile(path: Path | None) -> tuple[Host, ...]:
    """Return the hosts of a hostfile, in its order.

    Args:
        path: of `--hosts`; None when the option was not given.

    Raises:
        ConfigError: no file, no host, or a line that is no host; the message names the line.
    """
    if path is None:
        raise ConfigError(f"this launcher needs --hosts FILE; {_FORM}")
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"cannot read the host list {path} ({reason}); {_FORM}") from error
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"the host list {path} is larger than {_MAX_BYTES} bytes; {_FORM}")
    hosts = [
        _host(words, f"{path} line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if (words := line.partition("#")[0].strip(" \t\r"))
    ]
    if not hosts:
        raise ConfigError(f"the host list {path} names no host; {_FORM}")
    names = [host.name.lower() for host in hosts]
    twice = next((host.name for host in hosts if names.count(host.name.lower()) > 1), None)
    if twice is not None:
        raise ConfigError(f"the host list {path} names {twice} twice; give it one line with all its slots")
    return tuple(hosts)


def _host(line: str, where: str) -> Host:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ConfigError(f"{where}: {line!r} is no host; {_FORM}")
    name, slots = match["name"], int(match["slots"])
    if not is_host_name(name):
        raise ConfigError(
            f"{where}: {name!r} is no host name; use letters, digits, dots and hyphens, a letter or digit first "
            "(users and ports belong in launch.ssh of the recipe)"
        )
    if not 1 <= slots <= MAX_SLOTS:
        raise ConfigError(f"{where}: slots={slots} of {name}; use 1 to {MAX_SLOTS}, a slot for each rank")
    return Host(name, slots)
