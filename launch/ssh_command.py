"""Our own ssh command line: every word for the remote shell is quoted, and nothing is asked of a person."""

import shlex
from collections.abc import Sequence

from cogview2.launch.job import is_host_name
from cogview2.pipeline.config.launch import SshConfig
from cogview2.pipeline.errors import LaunchError

ALIVE_INTERVAL, ALIVE_COUNT = 15, 4
"""A host that is gone without a goodbye is noticed after their product in seconds."""


def ssh_argv(host: str, words: Sequence[str], config: SshConfig) -> list[str]:
    """Return the argv that runs `words` on `host`, as one command of its login shell.

    Host keys, keys and jump hosts are the business of the user's own ssh configuration.

    Raises:
        LaunchError: `host` is no host name (it could be read as an option).
    """
    if not is_host_name(host):
        raise LaunchError(f"{host!r} is no host name; use letters, digits, dots and hyphens")
    options = {
        "BatchMode": "yes",
        "PasswordAuthentication": "no",
        "ConnectTimeout": config.connect_seconds,
        "ServerAliveInterval": ALIVE_INTERVAL,
        "ServerAliveCountMax": ALIVE_COUNT,
    }
    argv = ["ssh", "-T", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    if config.port is not None:
        argv += ["-p", str(config.port)]
    if config.user is not None:
        argv += ["-l", config.user]
    return [*argv, "--", host, shlex.join(words)]
