"""The host list is read strictly: ssh reads its names next."""

from pathlib import Path

import pytest

from cogview2.launch import launchers
from cogview2.launch.hostfile import read_hostfile
from cogview2.launch.job import Host
from cogview2.launch.ssh_command import ssh_argv
from cogview2.pipeline.config.launch import SshConfig
from cogview2.pipeline.errors import ConfigError, LaunchError


def read(tmp_path: Path, text: str | bytes) -> tuple[Host, ...]:
    path = tmp_path / "hosts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_hostfile(path)


def test_a_list(tmp_path: Path) -> None:
    text = "# our hosts\n\nnode-1.example\tslots=8   # the first\r\n  10.0.0.2   slots=1024\n"
    assert read(tmp_path, text) == (Host("node-1.example", 8), Host("10.0.0.2", 1024))


BAD_LINES = [
    "node1",
    "node1 slots=0",
    "node1 slots=1025",
    "node1 slots=4junk",
    "node1 slots=٤",
    "node1 slots = 4",
    "node1 slots=4 slots=4",
    "node1 max_slots=4",
    "user@node1 slots=4",
    "node1:22 slots=4",
    "-oProxyCommand=touch${IFS}canary slots=2",
    "node1;touch slots=2",
    "$(touch) slots=2",
    "nöde slots=2",
    "a\x0bb slots=2",
    "a\x00b slots=2",
    f"{'n' * 254} slots=2",
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match="line 2: ") as caught:
        read(tmp_path, f"good slots=1\n{line}\n")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "names no host"),
        ("# nothing\n\n", "names no host"),
        ("a slots=1\nb slots=1\nA slots=2\n", "names a twice"),
        (b"\xff\xfe", "it is no text"),
        ("#" * (1 << 20) + "\na slots=1\n", "larger than"),
    ],
)
def test_bad_files(tmp_path: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read(tmp_path, text)


def test_a_missing_file_and_a_missing_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the host list .*nowhere .No such file"):
        read_hostfile(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="needs --hosts FILE"):
        launchers.make("hostfile", None)
    with pytest.raises(ConfigError, match="no such launcher; use one of local, hostfile"):
        launchers.make("rsh")


def test_ssh_asks_nothing_and_quotes_everything() -> None:
    words = ["python", "/a b/$(touch canary)", "it's", "{0..3}", "*", ""]
    argv = ssh_argv("node1", words, SshConfig(user="me", port=2222, connect_seconds=7))
    assert argv[0] == "ssh" and argv[-3:-1] == ["--", "node1"]
    assert argv[-1] == "python '/a b/$(touch canary)' 'it'\"'\"'s' '{0..3}' '*' ''"
    assert argv[argv.index("-p") + 1] == "2222" and argv[argv.index("-l") + 1] == "me"
    for option in (
        "BatchMode=yes",
        "PasswordAuthentication=no",
        "ConnectTimeout=7",
        "ServerAliveInterval=15",
    ):
        assert argv[argv.index(option) - 1] == "-o"
    assert not any("StrictHostKeyChecking" in word for word in argv)
    with pytest.raises(LaunchError, match="no host name"):
        ssh_argv("-oProxyCommand=x", ["true"], SshConfig())
