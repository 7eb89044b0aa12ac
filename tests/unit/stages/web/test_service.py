"""The studio behind the page: what it refuses, one job at a time, progress, stopping, and what people read."""

import io
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from typing import Any

import pytest
from PIL import Image

from cogview2.pipeline.errors import CheckpointError, DataError, LockedError
from cogview2.stages.web.engine import Box, Description, Drawing, Facts, Report
from cogview2.stages.web.service import LARGEST_SEED, UPLOADS, Cancelled, Studio, box_of, explain

SIDE = 24
SECONDS = 20


class Fake:
    """Waits for `go` before every model run, and remembers what it was asked for."""

    facts = Facts(name="fake", device="CPU", side=SIDE, styles=("none", "oil"))

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.go, self.began = threading.Event(), threading.Event()
        self.go.set()
        self.error: Exception | None = None
        self.most_at_once = self.at_once = 0

    def _work(self, report: Report, *asked: Any) -> None:
        self.asked.append(asked)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            for run in range(3):
                report(run, 3)
                self.began.set()
                assert self.go.wait(SECONDS)
            if self.error is not None:
                raise self.error
        finally:
            self.at_once -= 1

    def generate(
        self, text: str, style: str, seed: int, candidates: int, report: Report
    ) -> Sequence[Drawing]:
        self._work(report, "generate", text, style, seed, candidates)
        return [Drawing(Image.new("RGB", (SIDE, SIDE)), seed, number, None) for number in range(candidates)]

    def edit(
        self,
        picture: Image.Image,
        box: Box,
        text: str,
        style: str,
        seed: int,
        candidates: int,
        report: Report,
    ) -> Sequence[Drawing]:
        self._work(report, "edit", picture.size, box, text, style, seed, candidates)
        return [Drawing(picture, seed, number, None) for number in range(candidates)]

    def caption(self, picture: Image.Image, seed: int, report: Report) -> Sequence[Description]:
        self._work(report, "caption", picture.getpixel((0, 0)), seed)
        return [
            Description("en", "a circle", -0.5),
            Description("zh", "\N{CJK UNIFIED IDEOGRAPH-5706}", -0.7),
        ]


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def studio(fake: Fake) -> Iterator[Studio]:
    studio = Studio(fake, most_waiting=2)
    yield studio
    fake.go.set()
    studio.close()


def png(size: tuple[int, int], colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_requests_reach_the_engine_as_whole_numbers_and_clean_text(studio: Studio, fake: Fake) -> None:
    drawn = studio.generate("  a red circle\n", "oil", 7.0, 2.0).future.result(SECONDS)
    assert [drawing.number for drawing in drawn] == [0, 1]
    edited = studio.edit(drawn[0].picture, (2, 3, 10, 20), "a square", "none", 0, 1).future.result(SECONDS)
    assert len(edited) == 1
    found = studio.caption(drawn[1].picture).future.result(SECONDS)
    assert [description.language for description in found] == ["en", "zh"]
    assert fake.asked == [
        ("generate", "a red circle", "oil", 7, 2),
        ("edit", (SIDE, SIDE), (2, 3, 10, 20), "a square", "none", 0, 1),
        ("caption", (0, 0, 0), 0),
    ]
    assert all(type(number) is int for number in fake.asked[0][3:])


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"text": " \n"}, "empty"),
        ({"text": "x" * 1001}, "1001 characters"),
        ({"style": "../oil"}, "no style '../oil'"),
        ({"seed": None}, "The seed"),
        ({"seed": 1.5}, "The seed"),
        ({"seed": -1}, "The seed"),
        ({"seed": float("nan")}, "The seed"),
        ({"seed": float("inf")}, "The seed"),
        ({"seed": LARGEST_SEED + 1}, "The seed"),
        ({"seed": "7"}, "The seed"),
        ({"candidates": 0}, "number of pictures"),
        ({"candidates": 9}, "number of pictures"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused_in_a_sentence(
    studio: Studio, fake: Fake, wish: dict[str, Any], said: str
) -> None:
    asked = {"text": "a circle", "style": "none", "seed": 0, "candidates": 1} | wish
    with pytest.raises(DataError, match=said):
        studio.generate(**asked)
    with pytest.raises(DataError, match=said):
        studio.edit(Image.new("RGB", (SIDE, SIDE)), (0, 0, 9, 9), **asked)
    assert fake.asked == [] and studio.waiting == 0


@pytest.mark.parametrize(
    "box",
    [None, (-1, 0, 9, 9), (0, 0, SIDE + 1, 9), (9, 0, 9, 9), (9, 9, 3, 12), (0, 0, 1, 9), (0, 9, 24, 10)],
)
def test_a_box_must_lie_in_the_picture_and_be_no_line(studio: Studio, box: Box | None) -> None:
    with pytest.raises(DataError, match="box"):
        studio.edit(Image.new("RGB", (SIDE, SIDE)), box, "a circle", "none", 0, 1)


@pytest.mark.parametrize(
    "sent",
    [
        None,
        7,
        "1,2,3,4",
        {"left": 1},
        [1, 2, 3],
        [1, 2, 3, None],
        [1, 2, 3, "4"],
        [1, 2, 3, float("nan")],
        [0, 0, 9, 1e300],
    ],
)
def test_what_is_no_box_is_none(sent: object) -> None:
    assert box_of(sent) is None


def test_a_box_from_the_browser_becomes_whole_numbers() -> None:
    assert box_of([1, 2.0, 30, 40]) == (1, 2, 30, 40)
    assert box_of([-5, 2, 30, 40]) == (-5, 2, 30, 40)  # refused later, with a sentence


def test_without_a_picture_there_is_nothing_to_edit_or_to_describe(studio: Studio) -> None:
    with pytest.raises(DataError, match="no picture yet"):
        studio.edit(None, (0, 0, 9, 9), "a circle", "none", 0, 1)
    with pytest.raises(DataError, match="no picture yet"):
        studio.caption(None)


def test_jobs_are_done_one_by_one_in_order(studio: Studio, fake: Fake) -> None:
    fake.go.clear()
    jobs = [studio.generate(f"circle {number}", "none", 0, 1) for number in range(3)]
    assert fake.began.wait(SECONDS)
    assert studio.waiting == 3 and [studio.ahead(job) for job in jobs] == [0, 1, 2]
    assert [job.running for job in jobs] == [True, False, False]
    with pytest.raises(LockedError, match="3 jobs"):
        studio.generate("one too many", "none", 0, 1)
    fake.go.set()
    assert not wait([job.future for job in jobs], SECONDS).not_done
    assert [asked[1] for asked in fake.asked] == ["circle 0", "circle 1", "circle 2"]
    assert fake.most_at_once == 1 and studio.waiting == 0
    assert (jobs[0].done, jobs[0].total) == (2, 3)


def test_a_running_job_stops_before_its_next_model_run_and_a_waiting_one_never_starts(
    studio: Studio, fake: Fake
) -> None:
    fake.go.clear()
    jobs = [studio.generate(f"circle {number}", "none", 0, 1) for number in range(3)]
    assert fake.began.wait(SECONDS)
    jobs[0].cancel()
    jobs[1].cancel()
    fake.go.set()
    for job in jobs[:2]:
        assert isinstance(job.future.exception(SECONDS), Cancelled)
    assert len(jobs[2].future.result(SECONDS)) == 1
    assert [asked[1] for asked in fake.asked] == ["circle 0", "circle 2"]
    assert jobs[0].done == 0


def test_closing_stops_what_runs_and_what_waits(fake: Fake) -> None:
    studio = Studio(fake)
    fake.go.clear()
    jobs = [studio.generate("a circle", "none", 0, 1) for _ in range(3)]
    assert fake.began.wait(SECONDS)
    threading.Timer(0.05, fake.go.set).start()
    studio.close()
    assert all(isinstance(job.future.exception(0), Cancelled) for job in jobs) and len(fake.asked) == 1


def test_after_an_error_the_next_job_is_done(studio: Studio, fake: Fake) -> None:
    fake.error = DataError("the prompt has 300 tokens, at most 110 are possible")
    failed = studio.generate("a circle", "none", 0, 1)
    assert explain(failed.future.exception(SECONDS) or AssertionError()) == (
        "The prompt has 300 tokens, at most 110 are possible."
    )
    fake.error = None
    assert len(studio.generate("a circle", "none", 0, 1).future.result(SECONDS)) == 1


def test_uploads_become_the_middle_square_of_the_working_size(studio: Studio) -> None:
    wide = Image.new("RGB", (90, 30), "blue")
    wide.paste("red", (30, 0, 60, 30))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    picture = studio.open(buffer.getvalue())
    assert picture.size == (SIDE, SIDE) and picture.mode == "RGB"
    assert picture.getpixel((SIDE // 2, 2)) == (255, 0, 0)
    assert studio.open(png((3, 3))).size == (SIDE, SIDE)  # small ones are enlarged


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"hello, this is text", "no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (png((40, 40))[:60], "damaged|missing"),
        (png((900, 20)), "8 times as long"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * UPLOADS.max_file_bytes, "above 16 MB"),
    ],
)
def test_uploads_that_are_no_pictures_are_refused_in_a_sentence(
    studio: Studio, data: bytes, said: str
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        studio.open(data)
    assert "image_" not in str(caught.value) and "data.images" not in str(caught.value)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(studio: Studio) -> None:
    side = int(UPLOADS.max_pixels**0.5) + 1
    header = bytearray(png((8, 8)))
    header[16:24] = side.to_bytes(4, "big") * 2
    checksum = zlib.crc32(bytes(header[12:29]))
    header[29:33] = checksum.to_bytes(4, "big")
    with pytest.raises(DataError, match="32 million pixels"):
        studio.open(bytes(header))


def test_what_nobody_foresaw_is_logged_and_shown_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    assert "terminal" in explain(RuntimeError("secret detail")) and "secret" not in explain(
        RuntimeError("secret detail")
    )
    assert "secret detail" in caplog.text
    assert explain(Cancelled()) == "Stopped."
    assert explain(CheckpointError("this file is damaged")) == "This file is damaged."
    assert "memory" in explain(MemoryError())
