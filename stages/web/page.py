"""The page: three tabs over one studio. Each open page has its own state; work and pictures are shared."""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from nicegui import ui
from PIL import Image

from cogview2.stages.web.engine import Box, Drawing
from cogview2.stages.web.pictures import PictureStore
from cogview2.stages.web.service import LARGEST_SEED, MOST_CANDIDATES, MOST_CHARACTERS, Studio
from cogview2.stages.web.widgets import BoxImage, Gallery, Upload, Work, figure, tag

_STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
_LANGUAGES = {"en": "English", "zh": "Chinese"}
TakePicture = Callable[[Image.Image], Awaitable[None]]


class _Wishes:
    """The fields that drawing and editing share: text, style, seed, number of pictures."""

    def __init__(self, studio: Studio, label: str, example: str) -> None:
        self.text = ui.textarea(label, placeholder=example).props(
            f"outlined stack-label autogrow maxlength={MOST_CHARACTERS}"
        )
        styles = list(studio.facts.styles)
        with ui.element("div").classes("fields"):
            self.style = ui.select(styles, value=styles[0], label="Style").props(
                "outlined dense options-dense"
            )
            self.style.set_visibility(len(styles) > 1)
            self.seed = ui.number("Seed", value=0, min=0, max=LARGEST_SEED, step=1, format="%d").props(
                "outlined dense"
            )
            self.count = ui.number("Pictures", value=1, min=1, max=MOST_CANDIDATES, step=1, format="%d")
            self.count.props("outlined dense")
        with self.seed.add_slot("append"):
            ui.button(icon="casino", on_click=self._new_seed, color=None).props(
                'flat round dense aria-label="New seed"'
            ).tooltip("New seed")

    def _new_seed(self) -> None:
        self.seed.set_value(secrets.randbelow(LARGEST_SEED))

    @property
    def values(self) -> tuple[str, str, float | None, float | None]:
        """Text, style, seed, number of pictures; unchecked."""
        return self.text.value or "", self.style.value, self.seed.value, self.count.value


def _words(drawing: Drawing, name: str) -> str:
    parts = [name, f"seed {drawing.seed}", f"number {drawing.number}"]
    if drawing.score is not None:
        parts.append(f"score {drawing.score:.2f}")
    return " \N{MIDDLE DOT} ".join(parts)


class _Page:
    """One open page."""

    def __init__(self, studio: Studio, store: PictureStore) -> None:
        self._studio, self._store = studio, store
        self._to_edit: Image.Image | None = None
        self._to_caption: Image.Image | None = None
        self._box: Box | None = None
        self._head()
        with ui.tabs().props('align=left no-caps indicator-color="primary"') as self._tabs:
            for name in ("Generate", "Edit", "Caption"):
                ui.tab(name)
        with ui.tab_panels(self._tabs, value="Generate", animated=False):
            with ui.tab_panel("Generate"), ui.element("div").classes("two"):
                self._generate_panel()
            with ui.tab_panel("Edit"), ui.element("div").classes("two"):
                self._edit_panel()
            with ui.tab_panel("Caption"), ui.element("div").classes("two"):
                self._caption_panel()

    def _head(self) -> None:
        facts = self._studio.facts
        with ui.element("header").classes("top"):
            with ui.element("h1"):
                tag("small", "CogView2")
                tag("span", facts.name)
            tag("div", f"{facts.side} x {facts.side} pixels, {facts.device}", "soft")
            queue = tag("div", classes="soft queue").props("role=status")

        def show_queue() -> None:
            jobs = self._studio.waiting
            waiting = f", {jobs - 1} waiting" if jobs > 1 else ""
            queue.set_text(f"1 job at work{waiting}" if jobs else "No job at work")

        ui.timer(0.5, show_queue)

    def _generate_panel(self) -> None:
        with ui.element("section").classes("card"):
            tag("h2", "Draw pictures for a text")
            self._drawn = _Wishes(
                self._studio, "Text, English or Chinese", "a red circle left of a blue square"
            )
            self._drawn.text.on("keydown.ctrl.enter", self._generate)
            self._generating = Work(self._studio, "Draw", self._generate)
        with ui.element("section").classes("card"):
            tag("h2", "Pictures")
            self._pictures = Gallery(self._store, "Drawn pictures appear here.")

    def _edit_panel(self) -> None:
        with ui.element("section").classes("card"):
            tag("h2", "Picture")
            Upload(self._studio, self._edit_this)
            self._canvas = BoxImage(self._studio.facts.side, self._take_box)
            self._canvas.set_visibility(False)
            self._box_words = tag("div", "Upload a picture, or take a drawn one.", "soft").props(
                "role=status"
            )
        with ui.element("div").classes("stack"):
            with ui.element("section").classes("card"):
                tag("h2", "Redraw a part of it")
                self._edited = _Wishes(self._studio, "What the box should show", "a green triangle")
                self._edited.text.on("keydown.ctrl.enter", self._edit)
                self._editing = Work(self._studio, "Redraw the box", self._edit)
            with ui.element("section").classes("card"):
                tag("h2", "Before and after")
                self._pairs = Gallery(self._store, "Edited pictures appear here.")

    def _caption_panel(self) -> None:
        with ui.element("section").classes("card"):
            tag("h2", "Picture")
            Upload(self._studio, self._caption_this)
            with ui.element("div") as self._captioned:
                tag("div", "Upload a picture, or take a drawn one.", "soft")
            self._captioning = Work(self._studio, "Describe", self._caption)
        with ui.element("section").classes("card"):
            tag("h2", "Captions")
            self._captions = Gallery(self._store, "English and Chinese captions appear here.")

    def _facts(self, drawing: Drawing, text: str, style: str) -> dict[str, str]:
        return {"Description": text, "Style": style, "Seed": str(drawing.seed), "Number": str(drawing.number)}

    def _move_on(self, picture: Image.Image, *, edit: str = "Edit") -> None:
        """Add the buttons that take a picture to the other tabs."""
        for label, take in ((edit, self._edit_this), ("Caption", self._caption_this)):
            # The picture is bound now: the loop variable of the caller changes.
            async def move(take: TakePicture = take) -> None:
                await take(picture)

            ui.button(label, on_click=move, color=None).props("unelevated dense").classes("calm")

    async def _show_drawings(
        self,
        place: Any,
        gallery: Gallery,
        drawings: Sequence[Drawing],
        text: str,
        style: str,
        name: str,
        edit: str,
    ) -> None:
        sources = [
            await gallery.keep(drawing.picture, self._facts(drawing, text, style)) for drawing in drawings
        ]
        with place:
            for drawing, source in zip(drawings, sources, strict=True):
                file_name = f"cogview2-seed{drawing.seed}-{drawing.number}.png"
                with figure(source, f"{name} for: {text}", _words(drawing, name), file_name):
                    self._move_on(drawing.picture, edit=edit)

    async def _generate(self) -> None:
        text, style, seed, count = self._drawn.values
        drawings = await self._generating.do(lambda: self._studio.generate(text, style, seed, count))
        if drawings is not None:
            with self._pictures.clear():
                place = ui.element("div").classes("gallery")
                if len(drawings) > 1:
                    tag("p", "Score: log-likelihood of the text as the caption of a picture.", "soft")
            await self._show_drawings(place, self._pictures, drawings, text, style, "Drawn", "Edit")

    async def _edit_this(self, picture: Image.Image) -> None:
        self._to_edit, self._box = picture, None
        self._canvas.show(await self._pairs.keep(picture, {}), "The picture to edit")
        self._canvas.set_visibility(True)
        self._box_words.set_text("Draw a box around what should change.")
        self._editing.say("")
        self._tabs.set_value("Edit")

    def _take_box(self, box: Box | None) -> None:
        self._box = box
        if box is None:
            self._box_words.set_text("Draw a box around what should change.")
        else:
            left, top, right, bottom = box
            self._box_words.set_text(f"Box of {right - left} x {bottom - top} pixels at {left}, {top}.")

    async def _edit(self) -> None:
        text, style, seed, count = self._edited.values
        before, box = self._to_edit, self._box
        drawings = await self._editing.do(lambda: self._studio.edit(before, box, text, style, seed, count))
        if drawings is None or before is None:
            return
        source = await self._pairs.keep(before, {})
        with self._pairs.clear():
            for note in drawings[0].notes:
                tag("p", f"{note[:1].upper()}{note[1:]}.", "soft")
            with ui.element("div").classes("gallery wide") as place:
                figure(source, "The picture before", "Before")
        await self._show_drawings(place, self._pairs, drawings, text, style, "After", "Edit further")

    async def _caption_this(self, picture: Image.Image) -> None:
        self._to_caption = picture
        source = await self._captions.keep(picture, {})
        self._captioned.clear()
        with self._captioned:
            figure(source, "The picture to describe", "")
        self._captioning.say("")
        self._tabs.set_value("Caption")

    async def _caption(self) -> None:
        picture = self._to_caption
        found = await self._captioning.do(lambda: self._studio.caption(picture))
        if found is None:
            return
        with self._captions.clear() as place, ui.element("table").classes("captions"):
            with ui.element("thead"), ui.element("tr"):
                for name in ("Language", "Caption", "Score"):
                    tag("th", name).props("scope=col")
            with ui.element("tbody"):
                for description in found:
                    with ui.element("tr"):
                        tag("th", _LANGUAGES.get(description.language, description.language)).props(
                            "scope=row"
                        )
                        tag("td", description.text).props(f"lang={description.language}")
                        tag("td", f"{description.score:.2f}")
        with place:
            tag(
                "p", "Score: mean log-likelihood of the caption's tokens; the closer to 0, the surer.", "soft"
            )


def build(studio: Studio, store: PictureStore) -> Callable[[], None]:
    """Return the function that fills a page when a browser opens it."""

    def fill() -> None:
        ui.add_css(_STYLE)
        ui.colors(primary="#1f6fd6")
        _Page(studio, store)

    return fill
