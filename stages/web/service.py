"""The page's work: checked requests, one job at a time in a thread of its own, progress and stopping."""

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from PIL import Image

from cogview2.pipeline.config.data import ImageRulesConfig
from cogview2.pipeline.data.images import open_image, square
from cogview2.pipeline.data.records import RefusedError
from cogview2.pipeline.errors import CogView2Error, DataError, LockedError
from cogview2.stages.web.engine import Box, Description, Drawing, Engine, Report

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")

MOST_CANDIDATES = 8
MOST_CHARACTERS = 1000
LARGEST_SEED = 2**31 - 1
LEAST_BOX = 2
"""Pixels of a box, each way."""
UPLOADS = ImageRulesConfig(max_pixels=32_000_000, max_aspect=8.0, max_file_bytes=16 * 1024 * 1024)
_UPLOAD_ADVICE = {
    "image_empty": "The file is empty; choose another one.",
    "image_file_too_large": f"The file is above {UPLOADS.max_file_bytes >> 20} MB; choose a smaller one.",
    "image_not_an_image": "This file is no picture; choose a JPEG, PNG, WebP, GIF, BMP or TIFF file.",
    "image_corrupt": "The picture's file is damaged; choose another one.",
    "image_truncated": "The end of the picture's file is missing; choose another one.",
    "image_too_many_pixels": f"The picture has more than {UPLOADS.max_pixels // 10**6} million pixels; make it smaller.",
    "image_too_small": "The picture has no pixels; choose another one.",
    "image_extreme_aspect": f"The picture is more than {UPLOADS.max_aspect:g} times as long as wide; cut it first.",
}


class Cancelled(Exception):  # noqa: N818 - somebody's wish, not a fault
    """The job was stopped by the person who asked for it, or by the end of the server."""


class Job(Generic[Result]):
    """One piece of work: waiting, running or over."""

    def __init__(self) -> None:
        self.future: Future[Result] = Future()
        self.future.set_running_or_notify_cancel()  # who waits for it cannot cancel it behind the thread's back
        self.done, self.total = 0, None  # type: int, int | None
        self.running = False
        self._stop = threading.Event()

    def cancel(self) -> None:
        """Take the job out of the queue, or end it before its next model run."""
        self._stop.set()

    def report(self, done: int, total: int | None) -> None:
        """Note the progress.

        Raises:
            Cancelled: the job is to end.
        """
        if self._stop.is_set():
            raise Cancelled
        self.done, self.total = done, total


class Studio:
    """Generate, edit and caption with one engine, for every open page."""

    def __init__(self, engine: Engine, *, most_waiting: int = 8) -> None:
        """Start the thread that works.

        Args:
            engine: does the work.
            most_waiting: requests beyond so many waiting ones are refused.
        """
        self.facts = engine.facts
        self._engine, self._most_waiting = engine, most_waiting
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="studio")

    def generate(
        self, text: str, style: str, seed: float | None, candidates: float | None
    ) -> Job[Sequence[Drawing]]:
        """Queue the drawing of a text.

        Raises:
            DataError: a value that cannot be used.
            LockedError: too many jobs are waiting.
        """
        text, style = self._text(text, "Say what to draw."), self._style(style)
        whole_seed, count = _seed(seed), _candidates(candidates)
        return self._queue(lambda report: self._engine.generate(text, style, whole_seed, count, report))

    def edit(
        self,
        picture: Image.Image | None,
        box: Box | None,
        text: str,
        style: str,
        seed: float | None,
        candidates: float | None,
    ) -> Job[Sequence[Drawing]]:
        """Queue the redrawing of a box of a picture that `open` or a drawing gave; errors as of `generate`."""
        image = self._working(picture)
        region = _box(box, image.size)
        text, style = self._text(text, "Say what the box should show."), self._style(style)
        whole_seed, count = _seed(seed), _candidates(candidates)
        return self._queue(
            lambda report: self._engine.edit(image, region, text, style, whole_seed, count, report)
        )

    def caption(self, picture: Image.Image | None, seed: float | None = 0) -> Job[Sequence[Description]]:
        """Queue the description of a picture that `open` or a drawing gave; errors as of `generate`."""
        image, whole_seed = self._working(picture), _seed(seed)
        return self._queue(lambda report: self._engine.caption(image, whole_seed, report))

    def open(self, data: bytes) -> Image.Image:
        """Return an uploaded file as a working picture: RGB, the middle square, `facts.side` pixels each way.

        Raises:
            DataError: it is no picture, or too large a one.
        """
        try:
            return square(open_image(data, UPLOADS, min_side=1), self.facts.side)
        except RefusedError as error:
            raise DataError(
                _UPLOAD_ADVICE.get(error.reason, f"The picture cannot be used: {error.detail}.")
            ) from error

    def ahead(self, job: Job) -> int:
        """Return how many jobs run or wait before this one."""
        with self._lock:
            return sum(1 for _ in itertools.takewhile(lambda other: other is not job, self._jobs))

    @property
    def waiting(self) -> int:
        """Jobs that run or wait."""
        with self._lock:
            return len(self._jobs)

    def close(self) -> None:
        """Stop all jobs and wait for the thread."""
        with self._lock:
            for job in self._jobs:
                job.cancel()
        self._thread.shutdown(wait=True)

    def _queue(self, work: Callable[[Report], Result]) -> Job[Result]:
        job: Job[Result] = Job()
        with self._lock:
            if len(self._jobs) > self._most_waiting:
                raise LockedError(
                    f"{len(self._jobs)} jobs are running or waiting; try again when some are done."
                )
            self._jobs.append(job)
        self._thread.submit(self._perform, job, work)
        return job

    def _perform(self, job: Job[Result], work: Callable[[Report], Result]) -> None:
        try:
            job.report(0, None)
            job.running = True
            result = work(job.report)
        except BaseException as error:  # whoever waits for the job is told, whatever it was
            self._remove(job)
            job.future.set_exception(error)
        else:
            self._remove(job)
            job.future.set_result(result)

    def _remove(self, job: Job) -> None:
        with self._lock:
            self._jobs.remove(job)

    def _text(self, text: str, advice: str) -> str:
        if not text.strip():
            raise DataError(f"The text is empty. {advice}")
        if len(text) > MOST_CHARACTERS:
            raise DataError(f"The text has {len(text)} characters; at most {MOST_CHARACTERS} are possible.")
        return text.strip()

    def _style(self, style: str) -> str:
        if style not in self.facts.styles:
            raise DataError(f"There is no style {style!r}; choose one of: {', '.join(self.facts.styles)}.")
        return style

    def _working(self, picture: Image.Image | None) -> Image.Image:
        if picture is None:
            raise DataError("There is no picture yet; upload one, or take a drawn one.")
        if picture.mode != "RGB" or picture.size != (self.facts.side, self.facts.side):
            raise ValueError(
                f"a working picture is RGB and {self.facts.side} pixels each way, see Studio.open"
            )
        return picture


def box_of(value: Any) -> Box | None:
    """Return a box as the browser sent it, or None if it is none; its range is checked by `Studio.edit`."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    if not all(isinstance(number, int | float) and abs(number) < 1e6 for number in value):
        return None
    left, top, right, bottom = (int(number) for number in value)
    return left, top, right, bottom


def explain(error: BaseException) -> str:
    """Return one sentence for the page; what nobody foresaw goes to the server's terminal with its traceback."""
    if isinstance(error, Cancelled | CancelledError):
        return "Stopped."
    if isinstance(error, CogView2Error):
        text = str(error)
        return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
    LOG.error("a job failed", exc_info=error)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "The memory of the device does not suffice; ask for fewer pictures."
    return "Something went wrong that was not foreseen; the terminal of the server says more."


def _whole(value: float | None, name: str, least: int, most: int) -> int:
    if not isinstance(value, int | float) or not least <= value <= most or int(value) != value:
        raise DataError(f"{name} must be a whole number from {least} to {most}.")
    return int(value)


def _seed(value: float | None) -> int:
    return _whole(value, "The seed", 0, LARGEST_SEED)


def _candidates(value: float | None) -> int:
    return _whole(value, "The number of pictures", 1, MOST_CANDIDATES)


def _box(box: Box | None, size: tuple[int, int]) -> Box:
    if box is None:
        raise DataError("There is no box yet; draw one on the picture with the mouse.")
    left, top, right, bottom = box
    width, height = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise DataError(
            f"The box {left},{top},{right},{bottom} leaves the picture of {width} x {height}; draw it again."
        )
    if min(right - left, bottom - top) < LEAST_BOX:
        raise DataError(f"The box is smaller than {LEAST_BOX} x {LEAST_BOX} pixels; draw a larger one.")
    return left, top, right, bottom
