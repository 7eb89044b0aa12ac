"""Hosts on one machine: namespaces with an address, a name, files, processes and an sshd of their own.

A host is one process in new network, mount, process, name and IPC namespaces. When it dies the kernel ends every process
of the host, as a power cut does, and takes the network away with it: nothing is written outside the folder of the test,
no namespace has a name, nothing has to be cleaned up. The hosts of a `Lan` are joined by a bridge in a namespace that
has no way out. All see the same file system, except for what `Host.hide` and `Host.replace` change.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount", "ssh", "ssh-keygen", "/usr/sbin/sshd")
"""What must be installed: Debian's iproute2, util-linux, mount, openssh-client, openssh-server."""
_NETWORK = "10.77.0"
_SSH_PORT = 22
_INIT = Path(__file__).with_name("cluster_host_init.py")
_ENTER = ("--mount", "--uts", "--ipc", "--net", "--pid")
_LIMIT_SECONDS = 20.0
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where commands are looked for on a host: those of this Python first."""
_SSHD = """
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
MaxStartups 50
"""


def missing() -> str | None:
    """Return why hosts cannot be made here, in a few words; None where they can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    links = "ip link add br0 type bridge && ip link add veth0 type veth peer name veth1"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "sh", "-c", links],
        capture_output=True,
        check=False,
    )
    return "needs CAP_SYS_ADMIN and CAP_NET_ADMIN" if tried.returncode else None


def wait_for(
    condition: Callable[[], object], what: str, seconds: float = _LIMIT_SECONDS, every: float = 0.02
) -> None:
    """Wait until `condition` holds, looking `every` so many seconds.

    Raises:
        AssertionError: it did not within the limit; names `what`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(every)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _command(pid: int) -> str:
    """Return the command line of a living process, empty for a zombie or none."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


class Program:
    """A command that was started on a host."""

    def __init__(self, argv: Sequence[str], output: Path) -> None:
        self.output_path = output
        with open(output, "wb") as file:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        wait_for(lambda: _children(self._process.pid) or self.ended, "start of a program")
        self._pid = next(iter(_children(self._process.pid)), None)

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._process.poll() is not None

    @property
    def output(self) -> str:
        """What it has printed so far, errors too."""
        return self.output_path.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command itself, not to its children."""
        if self._pid is not None and not self.ended:
            os.kill(self._pid, number)

    def wait(self, seconds: float = 120.0) -> int:
        """Return the exit code (negative: the signal that ended it).

        Raises:
            AssertionError: it goes on for longer; it is killed then.
        """
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"still running after {seconds:.0f} s:\n{self.output}") from None


class Host:
    """One machine of a `Lan`."""

    def __init__(self, lan: "Lan", name: str, number: int, *, sshd: bool) -> None:
        self.lan = lan
        self.name = name
        self.address = f"{_NETWORK}.{number}"
        self.home = lan.folder / "homes" / name
        """Home folder of root there: ssh's key and known hosts."""
        self._port = f"port{number}"
        self._sshd = sshd
        self._holder: subprocess.Popen[str] | None = None
        self._programs = 0
        self.pid = 0
        """Process 1 of the host, as this machine numbers it."""

    def power_on(self) -> None:
        """Start the host; its address answers and its sshd listens when this returns."""
        (self.home / ".ssh").mkdir(parents=True, exist_ok=True)
        for name, source in (("id_ed25519", "user_key"), ("known_hosts", "known_hosts")):
            shutil.copy(self.lan.folder / source, self.home / ".ssh" / name)
        users = self.home / "passwd"
        lines = Path("/etc/passwd").read_text().splitlines()
        own = [
            f"root:x:0:0:root:{self.home}:/bin/bash" if line.startswith("root:") else line for line in lines
        ]
        users.write_text("\n".join(own) + "\n")
        files = [
            (str(self.lan.folder / "hosts"), "/etc/hosts"),
            (str(users), "/etc/passwd"),
            *self.lan.own_files,
        ]
        settings = {"name": self.name, "own_folders": ["/run", "/dev/shm"], "own_files": files}
        namespaces = ["unshare", "--fork", "--kill-child", "--mount-proc", *_ENTER]
        self._holder = subprocess.Popen(
            # Should this process die, the host dies too.
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                *namespaces,
                sys.executable,
                "-I",
                str(_INIT),
                json.dumps(settings),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests, which then end their hosts
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n", f"host {self.name} did not start"
        (self.pid,) = _children(self._holder.pid)
        self.lan.connect(self, self._port)
        if self._sshd:
            config = self.home / "sshd_config"
            config.write_text(_SSHD.format(port=_SSH_PORT, address=self.address, folder=self.lan.folder))
            self.run("/usr/sbin/sshd", "-f", str(config), "-E", str(self.home / "sshd.log"))
            wait_for(lambda: self.listens(_SSH_PORT), f"sshd of {self.name}")

    @property
    def is_on(self) -> bool:
        """Whether the host runs."""
        return self._holder is not None

    def power_off(self) -> None:
        """End every process of the host at once, without a word to anyone."""
        if self._holder is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._holder.wait()
        self._holder = None
        self.lan.disconnect(self._port)

    def listens(self, port: int) -> bool:
        """Return whether something accepts TCP connections at this port."""
        rows = [line.split() for line in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:]]
        return any(int(row[1].rpartition(":")[2], 16) == port and row[3] == "0A" for row in rows)

    def argv(self, command: Sequence[str], folder: Path | None = None, **environment: str) -> list[str]:
        """Return the argv that runs a command on the host, in a folder, with a small environment."""
        own = {"HOME": str(self.home), "PATH": PATH, "LANG": "C.UTF-8"} | environment
        words = [f"{name}={value}" for name, value in own.items()]
        enter = ["nsenter", "--target", str(self.pid), *_ENTER, "--"]
        return [*enter, "env", "--ignore-environment", f"--chdir={folder or self.home}", *words, *command]

    def run(
        self,
        *command: str,
        check: bool = True,
        seconds: float = 60.0,
        folder: Path | None = None,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        done = subprocess.run(
            self.argv(command, folder, **environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}"
        )
        return done

    def start(self, *command: str, folder: Path | None = None, **environment: str) -> Program:
        """Start a command."""
        self._programs += 1
        return Program(self.argv(command, folder, **environment), self.home / f"output-{self._programs}.txt")

    def processes(self, word: str) -> list[str]:
        """Return the command lines of the living processes of this host that hold `word`."""
        mine = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.stat(entry / "ns/pid").st_ino == mine:
                    found.append(_command(int(entry.name)))
        return sorted(line for line in found if word in line)

    def link(self, state: str) -> None:
        """Pull the network cable (`down`) or put it back (`up`)."""
        self.lan.ip("link", "set", self._port, state)

    @contextlib.contextmanager
    def replace(self, path: Path, content: str) -> Iterator[None]:
        """Let a file have another content, on this host alone."""
        other = self.home / path.name
        other.write_text(content)
        self.run("mount", "--bind", str(other), str(path))
        try:
            yield
        finally:
            self.run("umount", str(path))

    @contextlib.contextmanager
    def hide(self, folder: Path) -> Iterator[None]:
        """Let a folder be another, empty one on this host alone: a file system that is not shared."""
        self.run("mount", "-t", "tmpfs", "tmpfs", str(folder))
        try:
            yield
        finally:
            self.run("umount", str(folder))


class Lan:
    """A `driver` and hosts `node1`, `node2`, ... on one bridge. Use as a context manager."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.own_files: list[tuple[str, str]] = []
        """Files and folders that every host has its own of: (what it sees, where)."""
        self._switch: subprocess.Popen[bytes] | None = None
        self.driver = Host(self, "driver", 254, sshd=False)
        self.nodes = [Host(self, f"node{number}", number, sshd=True) for number in range(1, nodes + 1)]

    @property
    def hosts(self) -> list[Host]:
        """Driver and nodes."""
        return [self.driver, *self.nodes]

    def __enter__(self) -> "Lan":
        self.folder.mkdir(parents=True)
        for name in ("user_key", "host_key"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(self.folder / name)]
            subprocess.run(make, check=True)
        names = {host.name: host.address for host in self.hosts} | {"nobody": f"{_NETWORK}.99"}
        table = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
        (self.folder / "hosts").write_text("\n".join(table) + "\n")
        kind, key = (self.folder / "host_key.pub").read_text().split()[:2]
        (self.folder / "known_hosts").write_text("".join(f"{name} {kind} {key}\n" for name in names))
        self._switch = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        own = os.stat("/proc/self/ns/net").st_ino
        wait_for(lambda: os.stat(f"/proc/{self._switch.pid}/ns/net").st_ino != own, "the switch")
        try:
            self.ip("link", "add", "bridge0", "type", "bridge")
            self.ip("link", "set", "bridge0", "up")
            for host in self.hosts:
                host.power_on()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.power_off()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()

    def ip(self, *words: str, namespace: int | None = None) -> None:
        """Run `ip` in the network namespace of a process, by default that of the switch."""
        assert self._switch is not None
        target = str(namespace or self._switch.pid)
        argv = ["nsenter", "--target", target, "--net", "ip", *words]
        subprocess.run(argv, check=True, capture_output=True)

    def connect(self, host: Host, port: str) -> None:
        """Give a host its network card, plugged into the switch."""
        # A host that comes back has the same hardware address: its neighbours remember it.
        card = ["eth0", "address", f"02:00:00:00:00:{int(host.address.rpartition('.')[2]):02x}"]
        self.ip("link", "add", port, "type", "veth", "peer", "name", *card, "netns", str(host.pid))
        self.ip("link", "set", port, "master", "bridge0", "up")
        self.ip("address", "add", f"{host.address}/24", "dev", "eth0", namespace=host.pid)
        self.ip("link", "set", "eth0", "up", namespace=host.pid)

    def disconnect(self, port: str) -> None:
        """Take a host's network card away: connections that wait for an answer would keep it alive."""
        with contextlib.suppress(subprocess.CalledProcessError):  # it went away with its host
            self.ip("link", "delete", port)
