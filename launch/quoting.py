"""Words for programs that read text again: remote shells that quote nothing, and the lines of a batch script."""

import re

from cogview2.pipeline.errors import LaunchError

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def is_plain(text: str) -> bool:
    """Return whether no shell, no pdsh (`%h`, `%n`) and no mpirun (`;`) reads `text` as anything but itself."""
    return _PLAIN.fullmatch(text) is not None


def require_plain(text: str, what: str, reader: str) -> str:
    """Return `text`, which `reader` is given without any quoting.

    Raises:
        LaunchError: it holds a character that means something to a shell.
    """
    if is_plain(text):
        return text
    raise LaunchError(
        f"{what} is {text!r}, but {reader} hands it to a shell unquoted; use only letters, digits and _@+=:,./- there, "
        "or --launcher hostfile, which quotes"
    )


def require_line(text: str, what: str) -> str:
    """Return `text`, which must fit in one line of a script.

    Raises:
        LaunchError: it holds a line break or another control character.
    """
    if _CONTROL.search(text) is None:
        return text
    raise LaunchError(
        f"{what} {text!r} holds a line break or another control character; give it another name"
    )


def sbatch_word(text: str) -> str:
    """Return `text` as sbatch's own reader of `#SBATCH` lines takes it for one word: double quotes, backslash escapes."""
    if is_plain(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
