"""One holder of a run directory: races, killed and paused holders, clocks a day off, with flock and with leases."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from cogview2.pipeline import leases, locking
from cogview2.pipeline.errors import LockedError, RunDirectoryError
from cogview2.pipeline.locking import exclusive, holder, is_held

FORK = multiprocessing.get_context("fork")
CONTENDERS = 4
RENEW_SECONDS = 0.2
LIMIT_SECONDS = 30.0
DAY = 86_400.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of patience, and seconds between renewals, only cost time here."""
    monkeypatch.setattr(locking, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(leases, "RENEW_SECONDS", RENEW_SECONDS)


@pytest.fixture(params=["flock", "lease"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of locks; a file system without flock says so."""
    if request.param == "lease":
        without_flock(monkeypatch)
    return str(request.param)


def without_flock(monkeypatch: pytest.MonkeyPatch, number: int = errno.EOPNOTSUPP) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


def contender(path: Path, skew: float, pipe: Connection) -> None:
    """Try once when told to; hold until told otherwise, answering questions."""
    real = time.time
    time.time = lambda: real() + skew
    pipe.recv()
    try:
        with exclusive(path, "a contender") as held:
            pipe.send(held.token)
            while (question := pipe.recv()) != "release":
                assert question == "check"
                try:
                    held.check()
                    pipe.send("held")
                except LockedError as error:
                    pipe.send(str(error))
        pipe.send("released")
    except LockedError as error:
        pipe.send(str(error))


class Contender:
    """A process that wants the lock."""

    def __init__(self, path: Path, skew: float = 0.0) -> None:
        self.pipe, other = FORK.Pipe()
        self.process = FORK.Process(target=contender, args=(path, skew, other))
        self.process.start()
        other.close()

    def answer(self) -> Any:
        assert self.pipe.poll(LIMIT_SECONDS), "a contender gave no answer"
        return self.pipe.recv()

    def ask(self, question: str) -> Any:
        self.pipe.send(question)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@contextlib.contextmanager
def contenders(
    path: Path, count: int, skews: Callable[[int], float] = lambda _: 0.0
) -> Iterator[list[Contender]]:
    started = [Contender(path, skews(number)) for number in range(count)]
    try:
        yield started
    finally:
        for one in started:
            one.end()


def race(path: Path, skews: Callable[[int], float] = lambda _: 0.0) -> tuple[int, list[str]]:
    """Start all at once; return the winner's token and what the losers were told. Exactly one may win."""
    with contenders(path, CONTENDERS, skews) as all_of_them:
        for one in all_of_them:
            one.pipe.send("go")
        answers = [one.answer() for one in all_of_them]
        tokens = [answer for answer in answers if isinstance(answer, int)]
        assert len(tokens) == 1, answers
        winner = all_of_them[answers.index(tokens[0])]
        assert winner.ask("check") == "held"
        assert winner.ask("release") == "released"
    return tokens[0], [answer for answer in answers if isinstance(answer, str)]


@pytest.mark.parametrize("races", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_of_all_who_start_at_once_one_wins(tmp_path: Path, kind: str, races: int) -> None:
    """Clocks a day ahead or behind change nothing; tokens grow with every winner."""
    rng = random.Random(7)
    path = tmp_path / "run.lock"
    tokens = []
    for _ in range(races):
        skews = [rng.choice((-DAY, 0.0, DAY)) for _ in range(CONTENDERS)]
        token, told = race(path, lambda number: skews[number])  # noqa: B023 - used in this round
        tokens.append(token)
        assert len(told) == CONTENDERS - 1
        assert all("is in use by process" in message and "a contender" in message for message in told)
    assert tokens == sorted(set(tokens))
    print(f"{races} races with {kind}: one winner each, tokens {tokens[0]} to {tokens[-1]}")


def test_mutant_without_a_lock_several_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(AssertionError):
        race(tmp_path / "run.lock")


def test_mutant_leases_that_are_replaced_instead_of_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flock(monkeypatch)
    monkeypatch.setattr(os, "link", lambda source, target: os.replace(source, target) or Path(source).touch())
    with pytest.raises(AssertionError):
        for _ in range(20):
            race(tmp_path / "run.lock")


def test_a_killed_holder_frees_it(tmp_path: Path, kind: str) -> None:
    """At once with flock; after three renewals without a sign with a lease, whatever the clocks say."""
    path = tmp_path / "run.lock"
    with contenders(path, 1, lambda _: DAY) as (first,):
        token = first.ask("go")
        assert is_held(path)
        said = holder(path)
        assert (
            said["pid"] == first.process.pid and said["token"] == token and said["purpose"] == "a contender"
        )
        with (
            pytest.raises(LockedError, match=f"process {first.process.pid} on host"),
            exclusive(path, "second"),
        ):
            pass
        os.kill(first.process.pid or 0, signal.SIGKILL)
        first.process.join()
        begin = time.monotonic()
        with exclusive(path, "second") as held:
            waited = time.monotonic() - begin
            assert held.token == token + 1
            held.check()
    print(f"taken {waited:.2f} s after SIGKILL with {kind}")
    assert waited < 1.0 if kind == "flock" else 2 * RENEW_SECONDS < waited < 10.0
    assert not is_held(path)


def test_a_living_holder_is_never_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the longest of waits: the contender goes as soon as it sees a renewal."""
    without_flock(monkeypatch)
    path = tmp_path / "run.lock"
    with contenders(path, 1) as (first,):
        first.ask("go")
        for _ in range(5):
            with pytest.raises(LockedError), exclusive(path, "second"):
                pass
        assert first.ask("check") == "held"
        assert first.ask("release") == "released"
    with exclusive(path, "third") as held:  # a lease that was released is free at once
        assert held.token == 2


def paused_holder(path: Path) -> str:
    """Pause a holder, take the lock over, let it go on: what its check says then."""
    with contenders(path, 1) as (first,):
        token = first.ask("go")
        os.kill(first.process.pid or 0, signal.SIGSTOP)
        with exclusive(path, "the next") as held:
            assert held.token == token + 1
            os.kill(first.process.pid or 0, signal.SIGCONT)
            answer = str(first.ask("check"))
            held.check()  # the former holder's thread must not have touched it
        first.ask("release")
        assert holder(path).get("token") in (None, held.token)
    return answer


def test_a_paused_former_holder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch)
    answer = paused_holder(tmp_path / "run.lock")
    assert "is no longer held by this process, token 1" in answer
    assert f"process {os.getpid()} on host" in answer and "token 2" in answer


def test_a_lock_that_the_file_server_forgot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flock of a file server that was restarted: two hold it, and the older one finds out before it writes."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    answer = paused_holder(tmp_path / "run.lock")
    assert "is no longer held by this process, token 1" in answer and "with token 2" in answer


def test_mutant_without_tokens_the_former_holder_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "_lost", lambda *_: None)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert paused_holder(tmp_path / "run.lock") == "held"


def test_mutant_a_lease_by_the_clock_is_lost_to_a_clock_of_tomorrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule that is not used: a lease is old when its time is. A living holder would lose it."""
    without_flock(monkeypatch)

    def by_the_clock(folder: Path, found: leases.Record | None, _: float) -> leases.Record | None:
        if found is None:
            return leases.Record(0, None, True, {})
        return found if found.free or time.time() - found.about["time"] > 3 * RENEW_SECONDS else None

    path = tmp_path / "run.lock"
    with contenders(path, 1, lambda _: -DAY) as (first,):
        first.ask("go")
        with pytest.raises(LockedError), exclusive(path, "second"):
            pass
        monkeypatch.setattr(leases, "_watched", by_the_clock)
        with exclusive(path, "second"):
            assert "no longer held" in first.ask("check")


def test_tokens_survive_a_kill_while_the_file_is_written(tmp_path: Path) -> None:
    """The record is written over, at once and in one block: there is no moment without a token."""
    path = tmp_path / "run.lock"
    for token in range(1, 4):
        with exclusive(path, "x" * 10 * token) as held:
            assert held.token == token
            assert path.stat().st_size == 1024 and json.loads(path.read_text())["token"] == token
            assert (
                json.loads(path.read_text())["boot"]
                == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            )


def test_what_an_older_version_wrote_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    for text in ("", "{", '{"host": "a", "pid": 1}' + " " * 3000, "\x00" * 600):
        path.write_text(text)
        with exclusive(path, "now") as held:
            assert held.token == 1
        assert holder(path)["purpose"] == "now"


@pytest.mark.parametrize("damage", ["deleted", "replaced"])
def test_a_lock_file_that_somebody_removed(tmp_path: Path, kind: str, damage: str) -> None:
    """Who deletes the lock file to get in takes the lock away; the former holder must notice."""
    path = tmp_path / "run.lock"
    with exclusive(path, "first") as held:
        held.check()
        for file in (path, *(tmp_path / "run.lock.leases").glob("*")):
            file.unlink()
        if damage == "replaced":
            with exclusive(path, "second") as other:
                other.check()
                assert other.token == held.token  # the number alone would not tell
                with pytest.raises(LockedError, match="no longer held"):
                    held.check()
        else:
            with pytest.raises(LockedError, match="no longer held"):
                held.check()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_each_way_of_having_no_flock_leads_to_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    without_flock(monkeypatch, number)
    path = tmp_path / "run.lock"
    assert not is_held(path)
    with exclusive(path, "here") as held:
        assert is_held(path) and holder(path)["purpose"] == "here" and held.token == 1
        held.check()
    assert not is_held(path)


def test_leases_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links: created exclusively instead."""
    without_flock(monkeypatch)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    tokens = [race(tmp_path / "run.lock")[0] for _ in range(3)]
    assert tokens == sorted(set(tokens))
    assert len(list((tmp_path / "run.lock.leases").iterdir())) == 1  # old ones are cleared away


def test_a_late_starter_cannot_take_a_token_of_the_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked, slept through two other holders, and created a file that is free again: it must give way."""
    without_flock(monkeypatch)
    path = tmp_path / "run.lock"
    folder = tmp_path / "run.lock.leases"
    real = leases._create

    def late(where: Path, token: int, content: bytes) -> bool:
        monkeypatch.setattr(leases, "_create", real)
        for _ in range(2):
            with exclusive(path, "others"):
                pass
        return real(where, token, content)

    monkeypatch.setattr(leases, "_create", late)
    with pytest.raises(LockedError), exclusive(path, "late"):
        pass
    assert [file.name for file in folder.iterdir()] == ["000000000002"]


def test_a_link_in_the_place_of_the_lock_file(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(RunDirectoryError, match="symbolic link"), exclusive(tmp_path / "run.lock", "x"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_the_job_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    path = tmp_path / "run.lock"
    with contenders(path, 1) as (first,):
        first.ask("go")
        with (
            pytest.raises(LockedError, match=r"job 4711 \(a contender\)") as caught,
            exclusive(path, "second"),
        ):
            pass
        assert caught.value.exit_code == 75
