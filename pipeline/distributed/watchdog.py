"""Tells a job that hangs from one that is slow, and names the rank that it waits for.

A thread of every rank writes the rank's heartbeat and reads those of the others. It needs no collective: these are
what hangs. A stopped or killed process writes no heartbeat; one that waits in a collective still does. A rank that cannot
write its own, as on a full disk, calls nobody silent: the others share that disk.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from cogview2.pipeline.attempt import HUNG, Attempt, Beat
from cogview2.pipeline.config.launch import WatchdogConfig
from cogview2.pipeline.errors import ExitCode

WAIT = "wait"
"""The phase of a rank that has nothing to do until others are ready: their progress counts, not its own."""
_PATIENCE = {
    "start": "start_seconds",
    "restore": "start_seconds",
    "data": "step_seconds",
    "step": "step_seconds",
    "sample": "save_seconds",
    "save": "save_seconds",
    "work": "work_seconds",
    WAIT: "work_seconds",
}
"""Phase -> key of launch.watchdog; the phases of one step of training in their order."""
_ORDER = {phase: number for number, phase in enumerate(_PATIENCE)}
_BEAT_SECONDS = 2.0
_TICK_SECONDS = 0.5
_SILENT_BEATS = 3
"""So many missing heartbeats are silence."""
_EVERYBODY = 16
"""Up to so many ranks all look at all heartbeats; in larger jobs four do, far apart."""
_LATE_SECONDS = 10.0
"""What the others of a large job leave those four before they look for themselves."""
_LAST_RESORT_SECONDS = 3.0
"""After so many further seconds stacks are written without this thread: it cannot run where somebody keeps the GIL."""
_STACKS_SECONDS = 3.0
"""How long a rank that leaves waits for the stacks of the others."""


class _Mark(NamedTuple):
    """Where the process is; replaced as a whole, so that the thread never sees half of it."""

    phase: str
    step: int | None
    number: int
    """Of this sign of progress."""
    at: float
    """time.monotonic of it."""


@dataclass
class _Peer:
    """Another rank, as its heartbeats show it; times are of our own monotonic clock."""

    beat: Beat | None
    seen: float
    """When a new heartbeat was last seen."""
    progressed: float
    """When progress was last seen."""

    def place(self) -> tuple[int, int]:
        """Return a value that grows with the work."""
        assert self.beat is not None
        return (self.beat.step or 0, _ORDER.get(self.beat.phase, 0))


class Watchdog:
    """The watchdog of one rank; see `start`."""

    def __init__(self, attempt: Attempt, rank: int, size: int, config: WatchdogConfig) -> None:
        self.attempt, self.rank, self.config = attempt, rank, config
        self.host, self.pid = socket.gethostname(), os.getpid()
        patiences = [value for key in _PATIENCE.values() if (value := getattr(config, key))]
        self.beat_seconds = min(_BEAT_SECONDS, min(patiences, default=_BEAT_SECONDS) / 8)
        self.silent_seconds = (_SILENT_BEATS + 0.5) * self.beat_seconds
        self._tick_seconds = min(_TICK_SECONDS, self.beat_seconds / 2)
        self._lookout = size <= _EVERYBODY or rank in (0, 1, size // 2, size - 1)
        now = time.monotonic()
        self._mark = _Mark("start", None, 0, now)
        self._steps = 0
        self._next_beat = now
        self._mute_since: float | None = None
        """Since when this rank's own heartbeat cannot be written."""
        self._peers = {other: _Peer(None, now, now) for other in range(size) if other != rank}
        self._ended, self._leaving = threading.Event(), threading.Lock()
        attempt.prepare_beats()
        self._stacks = open(attempt.stacks(rank), "a", encoding="utf-8")  # noqa: SIM115 - open as long as we live
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Stop the thread; a last heartbeat stays."""
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()

    def mark(self, phase: str, step: int | None) -> None:
        """Note progress: the process is at the beginning of `phase` now."""
        if phase not in _PATIENCE:
            raise ValueError(f"{phase!r} is no phase; use one of {', '.join(_PATIENCE)}")
        if phase == "restore":
            self._steps = 0
        elif phase == "step":
            self._steps += 1
        self._mark = _Mark(phase, step, self._mark.number + 1, time.monotonic())

    def again(self) -> None:
        """Note progress within the phase."""
        self._mark = self._mark._replace(number=self._mark.number + 1, at=time.monotonic())

    def patience(self, phase: str) -> float:
        """Return how many seconds a phase may last; 0 for ever."""
        seconds = float(getattr(self.config, _PATIENCE[phase]))
        first = phase in ("data", "step") and self._steps <= 1
        if first and seconds:
            return max(seconds, self.config.start_seconds) if self.config.start_seconds else 0.0
        return seconds

    def _run(self) -> None:
        while not self._ended.wait(self._tick_seconds):
            with contextlib.suppress(OSError):  # a full or slow disk: the next tick tries again
                self._look()

    def _look(self) -> None:
        now, mark = time.monotonic(), self._mark
        patience = self.patience(mark.phase)
        age = now - mark.at
        due = now >= self._next_beat
        if due:
            self._next_beat = now + self.beat_seconds
            self._arm(patience - age if patience and mark.phase != WAIT else None)
            self._beat(mark, age, now)
        margin = 0.0 if self._lookout else _LATE_SECONDS
        near = patience > 0 and age > patience + margin - min(patience / 2, 2 * self.silent_seconds)
        if due or near:
            self._heed_others()
        if near or (due and self._lookout):
            self._observe(now)
            reason = self._reason(now, mark, margin)
            if reason:
                self._leave(reason, tell=True)

    def _beat(self, mark: _Mark, age: float, now: float) -> None:
        wall = time.time()
        beat = Beat(self.rank, self.host, self.pid, mark.phase, mark.step, mark.number, wall - age, wall)
        try:
            self.attempt.write_beat(beat)
        except OSError as error:
            if self._mute_since is None:
                self._mute_since = now
                self._say(
                    f"heartbeats cannot be written below {self.attempt.path} ({error.strerror}), so until they can no "
                    "rank is called silent; free space there"
                )
            return
        if self._mute_since is not None:
            for peer in self._peers.values():  # they may have been mute as well: that time does not count
                peer.seen += now - self._mute_since
                peer.progressed += now - self._mute_since
            self._mute_since = None
            self._say("heartbeats can be written again")

    def _arm(self, seconds_left: float | None) -> None:
        """Let the kernel write the stacks and end the process should this thread not come back in time."""
        if seconds_left is None:
            faulthandler.cancel_dump_traceback_later()
            return
        seconds = max(seconds_left, 0.0) + self.beat_seconds + _LAST_RESORT_SECONDS
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks)

    def _observe(self, now: float) -> None:
        for rank, peer in self._peers.items():
            beat = self.attempt.beat(rank)
            if beat is None or beat == peer.beat:
                continue
            if peer.beat is None or beat.count != peer.beat.count:
                peer.progressed = now
            peer.beat, peer.seen = beat, now

    def _reason(self, now: float, mark: _Mark, margin: float) -> str:
        """Return the sentence that says why the job hangs; empty when it does not."""
        judged = {} if self._mute_since is not None else self._peers
        for rank, peer in judged.items():
            phase = "start" if peer.beat is None else peer.beat.phase
            patience = self.patience(phase) if phase in _PATIENCE else 0.0
            if patience and now - peer.seen > max(patience, self.silent_seconds) + margin:
                if self.attempt.outcome(rank) is None:
                    return self._sentence([rank], "silent", patience, phase)
        patience, at = self.patience(mark.phase), mark.at
        if mark.phase == WAIT:
            if self._mute_since is not None:
                # It does not see the others' progress; whoever is stuck among them has left long before.
                patience += max(map(self.patience, _PATIENCE)) if patience else 0.0
            elif not self._lookout:
                return ""
            else:
                at = max([at, *(peer.progressed for peer in self._peers.values())])
        if not patience or now - at <= patience + margin:
            return ""
        return self._blame(now, patience, mark)

    def _blame(self, now: float, patience: float, mark: _Mark) -> str:
        """Return whom the job waits for, now that this rank has made no progress for too long."""
        silent, alive, left = [], [], []
        for rank, peer in self._peers.items():
            if now - peer.seen <= self.silent_seconds and peer.beat is not None:
                alive.append(rank)
            elif (end := self.attempt.outcome(rank)) is None:
                silent += [rank] if self._mute_since is None else []
            elif end.code:
                left.append(f"rank {rank} (host {end.host}) left with {end.reason}: {end.message}")
        if silent:
            return self._sentence(silent, "silent", patience, mark.phase)
        if left:
            return "; ".join(left[:4]) + f"; and nothing moved for {patience:.3g} s"
        places = {rank: self._peers[rank].place() for rank in alive}
        places[self.rank] = (mark.step or 0, _ORDER[mark.phase])
        last = min(places.values())
        behind = sorted(rank for rank, place in places.items() if place == last)
        if len(behind) < len(places) and self._mute_since is None:
            return self._sentence(behind, "behind", patience, mark.phase)
        where = Beat(self.rank, self.host, self.pid, mark.phase, mark.step, 0, 0.0, 0.0).place
        how = f"for {patience:.3g} s ({_key(mark.phase)})"
        what = (
            f"this rank has made no progress {how} in {where}, and sees no others, as heartbeats cannot be written"
            if self._mute_since is not None
            else f"no rank has made progress {how}, all that live are in {where}"
        )
        return (
            f"{what}; read the stacks in {self.attempt.stacks(0).parent}, then start the same command again"
        )

    def _sentence(self, ranks: list[int], what: str, patience: float, phase: str) -> str:
        first = ", ".join(self._describe(rank, what) for rank in ranks[:4])
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        cause = (
            "stopped, killed, or on a host that hangs: look at that host"
            if what == "silent"
            else f"what the others wait for: read the stacks, or raise {_key(phase)}"
        )
        return (
            f"{first}{more}, while nothing moved for {patience:.3g} s; it is {cause}; stacks are in "
            f"{self.attempt.stacks(0).parent}; then start the same command again"
        )

    def _describe(self, rank: int, what: str) -> str:
        beat = self._peers[rank].beat if rank in self._peers else self.attempt.beat(rank)
        if beat is None:
            return f"rank {rank} never gave a sign of life"
        clock = time.strftime("%H:%M:%S", time.gmtime(beat.time if what == "silent" else beat.since))
        since = (
            f"silent since {clock} UTC" if what == "silent" else f"behind, without progress since {clock} UTC"
        )
        return f"{beat.name} is {since}, in {beat.place}"

    def _heed_others(self) -> None:
        """Leave when another rank says that the job hangs."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(self.attempt.hang_path.read_text(encoding="utf-8"))
            if said["rank"] != self.rank:
                self._leave(str(said["message"]), tell=False)

    def _leave(self, reason: str, *, tell: bool) -> NoReturn:
        """Write the stacks of all threads, tell the others, record the end, and end the process."""
        self._leaving.acquire()  # for ever: only one thread does this, and another that wants to waits for the end
        # All of this may hang as well, for example on a dead file system.
        faulthandler.dump_traceback_later(2 * _STACKS_SECONDS + 2, exit=True, file=self._stacks)
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.flush()
        with contextlib.suppress(OSError):
            if tell:
                self.attempt.write_hang(self.rank, reason)
        self._say(f"hang: {reason}")
        self._await_stacks()
        with contextlib.suppress(Exception):  # whatever it is, the process must end
            self.attempt.write_outcome(self.rank, HUNG, ExitCode.HANG, self._mark.step, reason)
        os._exit(int(ExitCode.HANG))

    def _say(self, words: str) -> None:
        """Log, but not through the logger: the thread that hangs may hold its lock."""
        text = f"rank {self.rank}: {words}\n"
        with (
            contextlib.suppress(OSError),
            open(self.attempt.rank_log(self.rank), "a", encoding="utf-8") as log,
        ):
            log.write(text)
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())

    def _await_stacks(self) -> None:
        """Give the ranks that live the time to notice: once this one is gone, its peers only see closed connections."""
        now = deadline = time.monotonic()
        deadline += _STACKS_SECONDS
        alive = [rank for rank, peer in self._peers.items() if now - peer.seen <= self.silent_seconds]
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if all(self.attempt.stacks(rank).stat().st_size for rank in alive):
                    return
            time.sleep(self._tick_seconds / 2)

    def heed_hang(self) -> None:
        """Do not return when the job hangs: an error is then what the leaving of the other ranks did to this one."""
        if self._leaving.locked():
            self._leaving.acquire()
        self._heed_others()

    def gone(self) -> str:
        """Return, as the end of a sentence, which ranks of this host died without a word; empty when none did."""
        dead = []
        for rank in self._peers:
            beat = self.attempt.beat(rank)
            if beat is None or beat.host != self.host or self.attempt.outcome(rank) is not None:
                continue
            if not _lives(beat.pid):
                dead.append(f"{beat.name} was killed in {beat.place}")
        return "".join(f"; {text}" for text in dead)


def _key(phase: str) -> str:
    return f"launch.watchdog.{_PATIENCE.get(phase, 'start_seconds')}"


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


_running: Watchdog | None = None


def start(attempt: Attempt, rank: int, size: int, config: WatchdogConfig) -> None:
    """Watch this process from now on; an earlier watchdog of the process ends.

    Args:
        attempt: where the ranks of the job keep heartbeats, stacks and outcomes.
        rank: of this process.
        size: ranks of the job.
        config: how long which phase may last.

    Raises:
        RunDirectoryError: the folders of the heartbeats cannot be made.
    """
    global _running
    stop()
    _running = Watchdog(attempt, rank, size, config)
    _running.begin()


def stop() -> None:
    """Watch no longer; nothing happens where nobody watches."""
    global _running
    if _running is not None:
        _running.end()
        _running = None


def enter(phase: str, step: int | None = None) -> None:
    """Note that this process begins `phase` (start, restore, data, step, sample, save, work, wait) of `step`: progress.

    Costs less than a microsecond, and does nothing where no watchdog runs.
    """
    if _running is not None:
        _running.mark(phase, step)


def progress() -> None:
    """Note progress within the phase, for example one token of a picture."""
    if _running is not None:
        _running.again()


def heed_hang() -> None:
    """Called after an unexpected error: does not return when the job hangs, see `Watchdog.heed_hang`."""
    if _running is not None:
        _running.heed_hang()


def gone() -> str:
    """Return, as the end of a sentence, which ranks of this host died without a word; empty when none did."""
    return "" if _running is None else _running.gone()
