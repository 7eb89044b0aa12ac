"""A look at all hosts at once, before anything is started: what is wrong with which of them, in plain words."""

import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogview2.launch import probe
from cogview2.launch.job import PRIVATE_MODE, Host
from cogview2.launch.ssh_command import ssh_argv
from cogview2.pipeline import fsops
from cogview2.pipeline.command_line import printable
from cogview2.pipeline.config.launch import LaunchConfig, SshConfig
from cogview2.pipeline.errors import LaunchError

_AT_ONCE = 64
_ANSWER_SECONDS = 30.0
"""For Python's start on a cold file system; the connection has a limit of its own."""
_CLOCK_SECONDS = 2.0
_SSH_FAILED = 255
_FIELDS = {
    "versions": dict,
    "source": str,
    "hostname": str,
    "sees_run": bool,
    "writes_run": bool,
    "gpus": int,
    "first_address": str,
    "own_address": str,
    "free_port": int,
    "clock": float,
}


@dataclass(frozen=True)
class Answer:
    """What one host said, or why it said nothing."""

    host: Host
    facts: dict[str, Any] | None
    silence: str = ""
    offset: float = 0.0
    """Seconds by which its clock is ahead of ours."""
    uncertainty: float = 0.0
    """Half of the time that asking took."""


@dataclass(frozen=True)
class Findings:
    """What a look at hosts that can all run the job has found."""

    cpu: bool
    """The ranks run on CPUs: no host has a GPU, or the recipe says so."""
    port: int
    """A free port of the first host."""
    warnings: tuple[str, ...]


def ask(hosts: Sequence[Host], run: Path, ssh: SshConfig) -> list[Answer]:
    """Ask all hosts at once; the token file that they look for is in `run`, which must exist, only meanwhile.

    Raises:
        RunDirectoryError: nothing can be written into `run`.
    """
    token = secrets.token_hex(8)
    fsops.write_text(probe.token_path(run, token), "", durable=False, mode=PRIVATE_MODE)
    try:
        with ThreadPoolExecutor(min(len(hosts), _AT_ONCE)) as pool:
            return list(pool.map(lambda host: _ask(host, run, token, hosts[0].name, ssh), hosts))
    finally:
        probe.token_path(run, token).unlink(missing_ok=True)


def _ask(host: Host, run: Path, token: str, first: str, ssh: SshConfig) -> Answer:
    words = [sys.executable, "-P", "-m", "cogview2.launch.probe"]
    words += ["--run-dir", str(run), "--token", token, "--first", first]
    limit = ssh.connect_seconds + _ANSWER_SECONDS
    begin = time.time()
    try:
        done = subprocess.run(
            ssh_argv(host.name, words, ssh),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(host, None, f"did not answer within {limit:.0f} s; look at its load and file systems")
    except OSError as error:
        raise LaunchError(
            f"cannot start ssh ({error.strerror}); install OpenSSH's client, or use another --launcher"
        ) from error
    end = time.time()
    facts = _facts(done.stdout.decode("utf-8", "replace"))
    if facts is None:
        said = done.stderr.decode("utf-8", "replace")
        return Answer(host, None, _silence(done.returncode, said, ssh))
    return Answer(host, facts, offset=facts["clock"] - (begin + end) / 2, uncertainty=(end - begin) / 2)


def _facts(text: str) -> dict[str, Any] | None:
    """Return what the probe printed, or None; anything around its line is the host's own talk."""
    for line in text.splitlines():
        if not line.startswith(probe.MARK):
            continue
        try:
            facts = json.loads(line.removeprefix(probe.MARK))
        except ValueError:
            return None
        if isinstance(facts, dict) and all(
            isinstance(facts.get(name), kind) for name, kind in _FIELDS.items()
        ):
            return facts
    return None


def _silence(code: int, said: str, ssh: SshConfig) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = printable(lines[-1])[:200] if lines else "no message"
    if code == _SSH_FAILED:
        user = f" -l {ssh.user}" if ssh.user else ""
        return f"unreachable: {last}; it must answer to `ssh -o BatchMode=yes{user}` without a question"
    if code == 127 or "No such file" in last:
        return f"has no {sys.executable} ({last}); install the same environment there under the same path"
    if "No module named" in last:
        return f"has no cogview2 in {sys.executable} ({last}); install the same version there"
    return f"gave no usable answer (exit code {code}: {last}); it must have the same version of cogview2"


def problems(answer: Answer, own: dict[str, Any], run: Path, first: str, *, gpus: bool) -> list[str]:
    """Return what is wrong with a host, in plain words; empty when it can run the job.

    Args:
        answer: of the host.
        own: what the submitting machine says about itself.
        run: the run directory.
        first: name of the first host.
        gpus: the ranks run on GPUs.
    """
    facts, host = answer.facts, answer.host
    if facts is None:
        return [answer.silence]
    found = [
        f"has {name} {printable(str(facts['versions'].get(name)))} where this machine has {version}"
        for name, version in own["versions"].items()
        if facts["versions"].get(name) != version
    ]
    if facts["source"] != own["source"]:
        found.append("has another version of cogview2's source files; install the same on all hosts")
    if not facts["sees_run"]:
        found.append(f"does not see {run}; use --runs-dir on a file system that all hosts share")
    elif not facts["writes_run"]:
        found.append(f"may not write into {run}; the user there needs the rights of the one here")
    if gpus and facts["gpus"] < host.slots:
        found.append(
            f"has {facts['gpus']} GPUs for slots={host.slots}; lower its slots, "
            "or use CPUs everywhere: --set launch.environment.DS_ACCELERATOR=cpu"
        )
    address = facts["first_address"]
    if not address or (address.startswith("127.") and host.name != first and first != address):
        found.append(
            f"takes the first host's name {first} for {address or 'nothing'}; "
            "correct its /etc/hosts, or write addresses into the host list"
        )
    return found


def by_own_name(launch: LaunchConfig, *, cpu: bool) -> bool:
    """Return whether ranks tell each other the address of their host's own name: gloo, without an interface set."""
    return cpu and launch.interface is None and "GLOO_SOCKET_IFNAME" not in launch.environment


def shared_with(answer: Answer, answers: Sequence[Answer], *, gpus: bool, own_name: bool) -> list[str]:
    """Return what is wrong with a host beside the others: one machine twice, or an address that only it can reach.

    Args:
        answer: of the host.
        answers: of all hosts, the first one's first.
        gpus: the ranks run on GPUs.
        own_name: see `by_own_name`.
    """
    if answer.facts is None:
        return []
    own, first = answer.facts["hostname"], answers[0]
    names = [a.host.name for a in answers if a.facts is not None and a.facts["hostname"] == own]
    found = []
    if gpus and len(names) > 1 and answer.host.name != names[0]:
        found.append(f"calls itself {own} as {names[0]} does; name each machine once, with all of its slots")
    literal = (
        first.host.name == answer.facts["first_address"]
    )  # a name that is wrong here is `problems`' business
    other = first.facts is not None and own != first.facts["hostname"]
    if other and literal and first.host.name.startswith("127."):
        found.append(
            f"cannot meet the others on {first.host.name}, an address of each host itself; write the address that the "
            "hosts know the first one by"
        )
    address, several = answer.facts["own_address"], {a.facts["hostname"] for a in answers if a.facts} != {own}
    if own_name and several and (not address or address.startswith("127.")):
        found.append(
            f"takes its own name {printable(own)} for {address or 'nothing'}, where no other host can reach it; correct "
            "its /etc/hosts, or set launch.interface to the network between the hosts"
        )
    return found


def examine(hosts: Sequence[Host], run: Path, launch: LaunchConfig) -> Findings:
    """Look at all hosts.

    Raises:
        LaunchError: some cannot run the job; one message names all of them, a line each.
    """
    answers = ask(hosts, run, launch.ssh)
    wants_cpu = launch.environment.get("DS_ACCELERATOR") == "cpu"
    cpu = wants_cpu or not any(answer.facts and answer.facts["gpus"] for answer in answers)
    own = {"versions": probe.versions(), "source": probe.source_digest()}
    bad = []
    for answer in answers:
        found = problems(answer, own, run, hosts[0].name, gpus=not cpu)
        found += shared_with(answer, answers, gpus=not cpu, own_name=by_own_name(launch, cpu=cpu))
        if found:
            bad.append(f"  {answer.host.name}: {'; '.join(found)}")
    if bad:
        raise LaunchError(
            "\n".join([f"{len(bad)} of {len(hosts)} hosts cannot run this job, nothing was started:", *bad])
        )
    facts = answers[0].facts
    assert facts is not None
    return Findings(cpu, facts["free_port"], tuple(clock_warnings(answers)))


def clock_warnings(answers: Sequence[Answer]) -> list[str]:
    """Return a line for each host whose clock surely differs from ours by seconds."""
    return [
        f"{answer.host.name}: its clock is {abs(answer.offset):.0f} s "
        f"{'ahead of' if answer.offset > 0 else 'behind'} this machine's; times in its logs differ"
        for answer in answers
        if answer.facts is not None and abs(answer.offset) > answer.uncertainty + _CLOCK_SECONDS
    ]


def doctor(hosts: Sequence[Host], runs: Path) -> tuple[str, bool]:
    """Return what `cogview2 doctor --hosts` shows, and whether all hosts can be used.

    Args:
        hosts: of the file.
        runs: where runs will be; until it exists, whether the hosts share it is not looked at.

    Raises:
        RunDirectoryError: nothing can be written into `runs`.
    """
    shared = runs.is_dir()
    folder = runs if shared else Path(tempfile.gettempdir())
    answers = ask(hosts, folder, SshConfig())
    own = {"versions": probe.versions(), "source": probe.source_digest()}
    if not shared:
        answers = [
            replace(answer, facts=answer.facts | {"sees_run": True, "writes_run": True})
            if answer.facts
            else answer
            for answer in answers
        ]
    text, good = _table(answers, own, folder)
    note = f"\n{runs} does not exist yet: whether all hosts share it was not looked at"
    return text if shared else text + note, good


def _table(answers: Sequence[Answer], own: dict[str, Any], run: Path) -> tuple[str, bool]:
    columns = ("host", "slots", "GPUs", "cogview2", "torch", "deepspeed", "python", "clock", "state")
    rows: list[tuple[str, ...]] = [columns]
    notes: list[str] = []
    gpus = any(answer.facts and answer.facts["gpus"] for answer in answers)
    for answer in answers:
        found = problems(answer, own, run, answers[0].host.name, gpus=gpus)
        notes += [f"{answer.host.name}: {problem}" for problem in found]
        rows.append((*_row(answer), "cannot be used" if found else "good"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*lines, *notes, *clock_warnings(answers)]), not notes


def _row(answer: Answer) -> tuple[str, ...]:
    first = (answer.host.name, str(answer.host.slots))
    if answer.facts is None:
        return (*first, *["-"] * 6)
    names = ("cogview2", "torch", "deepspeed", "python")
    versions = [printable(str(answer.facts["versions"].get(name, "missing"))) for name in names]
    return (*first, str(answer.facts["gpus"]), *versions, f"{answer.offset:+.1f} s")
