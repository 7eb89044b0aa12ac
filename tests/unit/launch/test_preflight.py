"""What a look at a host finds, in plain words."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cogview2.launch import preflight, probe
from cogview2.launch.job import Host
from cogview2.launch.preflight import Answer, clock_warnings, problems
from cogview2.pipeline.config.launch import LaunchConfig, SshConfig
from cogview2.pipeline.errors import LaunchError

OWN = {"versions": {"python": "3.11.2", "cogview2": "0.1.0", "torch": "2.13.0"}, "source": "abc"}


def facts(**changes: Any) -> dict[str, Any]:
    good = {
        "versions": dict(OWN["versions"]),
        "source": "abc",
        "hostname": "n",
        "sees_run": True,
        "writes_run": True,
        "gpus": 8,
        "first_address": "10.0.0.1",
        "own_address": "10.0.0.1",
        "free_port": 4711,
        "clock": 1.0,
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        (
            {"versions": OWN["versions"] | {"torch": "2.12.0"}},
            ["has torch 2.12.0 where this machine has 2.13.0"],
        ),
        ({"versions": {}}, ["has python None", "has cogview2 None", "has torch None"]),
        ({"versions": OWN["versions"] | {"torch": "\x1b[2J"}}, ["has torch \\x1b[2J where"]),
        ({"source": "other"}, ["another version of cogview2's source files"]),
        ({"sees_run": False, "writes_run": False}, ["does not see /runs/x; use --runs-dir on a file system"]),
        ({"writes_run": False}, ["may not write into /runs/x"]),
        ({"gpus": 3}, ["has 3 GPUs for slots=4; lower its slots"]),
        ({"first_address": ""}, ["takes the first host's name node1 for nothing"]),
        ({"first_address": "127.0.1.1"}, ["takes the first host's name node1 for 127.0.1.1"]),
    ],
)
def test_problems(changes: dict[str, Any], expected: list[str]) -> None:
    answer = Answer(Host("node2", 4), facts(**changes))
    found = problems(answer, OWN, Path("/runs/x"), "node1", gpus=True)
    assert len(found) == len(expected)
    assert all(words in text for text, words in zip(found, expected, strict=True)), found


def test_the_first_host_may_know_itself_as_loopback() -> None:
    answer = Answer(Host("node1", 4), facts(first_address="127.0.1.1"))
    assert problems(answer, OWN, Path("/r"), "node1", gpus=True) == []
    assert problems(Answer(Host("b", 99), facts(gpus=0)), OWN, Path("/r"), "node1", gpus=False) == []


def test_clocks() -> None:
    ahead = Answer(Host("a", 1), facts(), offset=9.0, uncertainty=0.2)
    behind = Answer(Host("b", 1), facts(), offset=-7.0, uncertainty=0.2)
    unsure = Answer(Host("c", 1), facts(), offset=9.0, uncertainty=8.0)
    good = Answer(Host("d", 1), facts(), offset=0.5, uncertainty=0.2)
    said = clock_warnings([ahead, behind, unsure, good, Answer(Host("e", 1), None, "unreachable")])
    assert [line.split(";")[0] for line in said] == [
        "a: its clock is 9 s ahead of this machine's",
        "b: its clock is 7 s behind this machine's",
    ]


def test_all_bad_hosts_stand_in_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = {"versions": probe.versions(), "source": probe.source_digest()}
    answers = [
        Answer(Host("a", 1), facts(**own)),
        Answer(Host("b", 1), None, "unreachable: No route to host"),
        Answer(Host("c", 1), facts(**own, sees_run=False)),
    ]
    monkeypatch.setattr(preflight, "ask", lambda *_: answers)
    with pytest.raises(LaunchError) as caught:
        preflight.examine([answer.host for answer in answers], tmp_path, LaunchConfig())
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 of 3 hosts cannot run this job, nothing was started:"
    assert lines[1] == "  b: unreachable: No route to host" and lines[2].startswith("  c: does not see")
    monkeypatch.setattr(preflight, "ask", lambda *_: answers[:1])
    findings = preflight.examine([answers[0].host], tmp_path, LaunchConfig())
    assert (findings.cpu, findings.port) == (False, 4711)
    on_cpu = LaunchConfig(environment={"DS_ACCELERATOR": "cpu"})
    assert preflight.examine([answers[0].host], tmp_path, on_cpu).cpu


@pytest.mark.parametrize(
    "text", ["", "cogview2-probe", "cogview2-probe []", "cogview2-probe {}", "x cogview2-probe {}"]
)
def test_garbage_is_no_answer(text: str) -> None:
    assert preflight._facts(text) is None


@pytest.mark.parametrize("field", sorted(facts()))
def test_an_answer_lacks_nothing(field: str) -> None:
    line = probe.MARK + json.dumps(facts())
    assert preflight._facts(f"Welcome!\n{line}\nbye") == facts()
    assert preflight._facts(probe.MARK + json.dumps(facts() | {field: None})) is None


def test_the_probe_says_what_is_so_and_is_fast(tmp_path: Path) -> None:
    probe.token_path(tmp_path, "ab12").touch()
    argv = [sys.executable, "-P", "-m", "cogview2.launch.probe", "--run-dir", str(tmp_path)]
    argv += ["--token", "ab12", "--first", "127.0.0.1"]
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - begin)
    found = preflight._facts(text)
    assert found is not None and found["sees_run"] and found["writes_run"]
    assert found["versions"] == probe.versions() and found["source"] == probe.source_digest()
    assert found["first_address"] == "127.0.0.1" and abs(found["clock"] - time.time()) < 60
    assert min(seconds) < 1.5  # wanted: 0.5 s; the margin is for a loaded machine
    assert not probe.look(tmp_path, "other", "no.such.host.invalid")["sees_run"]
    assert probe.look(tmp_path, "other", "no.such.host.invalid")["first_address"] == ""


def test_another_source_has_another_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda _: spec)
    before = probe.source_digest()
    (tmp_path / "note.txt").write_text("x")
    assert probe.source_digest() == before
    (tmp_path / "a.py").write_text("x = 2\n")
    changed = probe.source_digest()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({before, changed, probe.source_digest()}) == 3


def test_no_ssh_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="install OpenSSH's client"):
        preflight.ask([Host("a", 1)], tmp_path, SshConfig())
    assert list(tmp_path.iterdir()) == []


def shared(answer: Answer, answers: list[Answer], *, gpus: bool) -> list[str]:
    return preflight.shared_with(answer, answers, gpus=gpus, own_name=False)


def test_one_machine_twice_and_a_meeting_place_that_is_nowhere() -> None:
    def seen(name: str, hostname: str, first: str) -> Answer:
        return Answer(Host(name, 4), facts(hostname=hostname, first_address=first))

    twice = [seen("node1", "node1", "10.0.0.1"), seen("node1.cluster", "node1", "10.0.0.1")]
    assert shared(twice[0], twice, gpus=True) == []
    assert "calls itself node1 as node1 does" in shared(twice[1], twice, gpus=True)[0]
    assert shared(twice[1], twice, gpus=False) == []  # ranks of one CPU host in two groups
    nowhere = [seen("127.0.0.1", "a", "127.0.0.1"), seen("node2", "b", "127.0.0.1")]
    assert shared(nowhere[0], nowhere, gpus=False) == []
    assert "cannot meet the others on 127.0.0.1" in shared(nowhere[1], nowhere, gpus=False)[0]
    # Debian's default: a host knows its own name as loopback, the others do not.
    debian = [seen("node1", "node1", "127.0.1.1"), seen("node2", "node2", "10.0.0.1")]
    assert shared(debian[1], debian, gpus=False) == []


@pytest.mark.parametrize("address", ["127.0.1.1", ""])
def test_a_host_that_takes_its_own_name_for_loopback_is_named_where_ranks_meet_by_it(address: str) -> None:
    plain = Answer(Host("10.0.0.1", 1), facts(hostname="node1"))
    debian = Answer(Host("10.0.0.2", 1), facts(hostname="node2", own_address=address))
    (said,) = preflight.shared_with(debian, [plain, debian], gpus=False, own_name=True)
    assert f"takes its own name node2 for {address or 'nothing'}" in said and "set launch.interface" in said
    assert preflight.shared_with(plain, [plain, debian], gpus=False, own_name=True) == []
    assert preflight.shared_with(debian, [plain, debian], gpus=False, own_name=False) == []
    same = [debian, Answer(Host("10.0.0.3", 1), facts(hostname="node2", own_address=address))]
    assert preflight.shared_with(debian, same, gpus=False, own_name=True) == []  # one machine under two names
    assert preflight.by_own_name(LaunchConfig(), cpu=True)
    assert not preflight.by_own_name(LaunchConfig(), cpu=False)
    assert not preflight.by_own_name(LaunchConfig(interface="eth0"), cpu=True)
    assert not preflight.by_own_name(LaunchConfig(environment={"GLOO_SOCKET_IFNAME": "eth0"}), cpu=True)
