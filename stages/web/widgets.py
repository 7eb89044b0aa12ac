"""The parts that the page is made of: a picture to draw a box on, an upload, a job with its progress, a result."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from nicegui import events, ui
from nicegui.elements.mixins.text_element import TextElement
from PIL import Image

from cogview2.pipeline.errors import CogView2Error
from cogview2.stages.web.engine import Box
from cogview2.stages.web.pictures import PictureStore, encode
from cogview2.stages.web.service import UPLOADS, Job, Studio, box_of, explain

Result = TypeVar("Result")
_PROGRESS_SECONDS = 0.25
_REJECTED = f"The file is no picture, or above {UPLOADS.max_file_bytes >> 20} MB; choose another one."
_DROP = """
  <div class="drop">
    <q-btn unelevated no-caps class="calm" label="Choose a picture" type="a" @click="props.pickFiles">
      <q-uploader-add-trigger></q-uploader-add-trigger>
    </q-btn>
    <span>or drop one here</span>
  </div>
"""


def tag(name: str, text: str = "", classes: str = "") -> Any:
    """Add an HTML element that shows `text` as it is."""
    return TextElement(tag=name, text=text).classes(classes)


class BoxImage(ui.element, component="box_image.js"):  # type: ignore[call-arg, unused-ignore]
    """A square picture on which a box can be drawn by mouse, finger or keys."""

    def __init__(self, side: int, on_box: Callable[[Box | None], None]) -> None:
        """Show nothing yet; `on_box` hears of every new box."""
        super().__init__()
        self.props["side"] = side
        self.props["label"] = (
            "Draw a box with the mouse. Arrow keys make and move it, with Shift they size it, with Control they go "
            "by one pixel; Escape removes it."
        )
        self.on("box", lambda event: on_box(box_of(event.args)))

    def show(self, source: str, alt: str) -> None:
        """Show a picture without a box."""
        self.props["src"], self.props["alt"] = source, alt
        self.update()


class Sentence:
    """An error in one sentence, or nothing."""

    def __init__(self) -> None:
        self._element = tag("div", classes="error").props("role=alert")
        self.say("")

    def say(self, sentence: str) -> None:
        """Show a sentence; an empty one shows nothing."""
        self._element.set_text(sentence)
        self._element.set_visibility(bool(sentence))


class Work:
    """The button that starts a job, the one that stops it, its progress, and its error."""

    def __init__(self, studio: Studio, label: str, start: Callable[[], Awaitable[None]]) -> None:
        self._studio = studio
        self._job: Job | None = None
        with ui.element("div").classes("buttons"):
            self._start = ui.button(label, on_click=start, color=None).props("unelevated").classes("strong")
            self._stop = ui.button("Stop", on_click=self.stop, color=None).props("unelevated").classes("calm")
        with ui.element("div").classes("working") as self._working:
            self._bar = ui.linear_progress(0, show_value=False, color=None).props(
                'rounded animation-speed=250 aria-label="Progress"'
            )
            self._status = tag("div", classes="soft").props("role=status")
        self._error = Sentence()
        self.say = self._error.say
        self._timer = ui.timer(_PROGRESS_SECONDS, self._show, active=False)
        self._at_work(False)
        ui.context.client.on_delete(self.stop)

    def stop(self) -> None:
        """Stop the job, if there is one."""
        if self._job is not None:
            self._job.cancel()

    async def do(self, ask: Callable[[], Job[Result]]) -> Result | None:
        """Queue a job and return its result, or None after its error is shown."""
        if self._job is not None:
            return None
        self.say("")
        try:
            self._job = job = ask()
            self._at_work(True)
            return await asyncio.wrap_future(job.future)
        except Exception as error:
            self.say(explain(error))
            return None
        finally:
            self._job = None
            self._at_work(False)

    def _at_work(self, busy: bool) -> None:
        self._start.set_enabled(not busy)
        self._stop.set_visibility(busy)
        self._working.set_visibility(busy)
        self._timer.active = busy
        if busy:
            self._show()

    def _show(self) -> None:
        job = self._job
        if job is None:
            return
        known = job.running and bool(job.total)
        self._bar.props.update({"indeterminate": not known})
        self._bar.set_value(job.done / job.total if known and job.total else 0)
        self._bar.update()
        if job.running:
            self._status.set_text(
                f"{job.done} of {job.total} model runs" if known else f"{job.done} model runs"
            )
        else:
            ahead = self._studio.ahead(job)
            self._status.set_text(f"Waiting; {ahead} {'job' if ahead == 1 else 'jobs'} before this one")


class Upload:
    """A place to choose or drop a picture; hands on the working picture, or shows why there is none."""

    def __init__(self, studio: Studio, on_picture: Callable[[Image.Image], Awaitable[None]]) -> None:
        self._studio, self._on_picture = studio, on_picture
        self._error: Sentence
        with ui.element("div").classes("upload"):
            self._element = ui.upload(
                auto_upload=True,
                max_file_size=UPLOADS.max_file_bytes,
                on_upload=self._take,
                on_rejected=lambda: self._error.say(_REJECTED),
            ).props('accept="image/*" flat')
            self._error = Sentence()
        self._element.add_slot("header", _DROP)
        self._element.on(
            "failed", lambda: self._error.say("The picture could not be uploaded; try again."), args=[]
        )

    async def _take(self, event: events.UploadEventArguments) -> None:
        self._element.reset()
        try:
            picture = await asyncio.to_thread(self._studio.open, await event.file.read())
        except CogView2Error as error:
            return self._error.say(explain(error))
        self._error.say("")
        await self._on_picture(picture)


class Gallery:
    """Where results appear; a hint until there are any."""

    def __init__(self, store: PictureStore, hint: str) -> None:
        self._store = store
        with ui.element("div") as self._place:
            tag("div", hint, "empty")

    async def keep(self, picture: Image.Image, facts: dict[str, str]) -> str:
        """Store a picture and return its address, relative to the page."""
        return f"pictures/{self._store.add(await asyncio.to_thread(encode, picture, facts))}"

    def clear(self, classes: str = "") -> Any:
        """Empty the place and return it."""
        self._place.clear()
        self._place.classes(replace=classes)
        return self._place


def figure(source: str, alt: str, words: str, file_name: str = "") -> Any:
    """Add a picture with words below; returns the row of its buttons, where `file_name` can be downloaded from."""
    with ui.element("figure").classes("figure"):
        image = ui.element("img")
        image.props["src"], image.props["alt"] = source, alt
        if words:
            tag("figcaption", words)
        with ui.element("div").classes("buttons") as buttons:
            if file_name:
                link = tag("a", "Download")
                link.props["href"], link.props["download"] = source, file_name
                link.props["aria-label"] = f"Download {file_name}"
    return buttons
