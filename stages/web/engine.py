"""What the page asks for and gets: plain records, and the protocol of whoever does the work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from cogview2.pipeline.config.data import Language

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the working picture; right and bottom are outside."""

Report = Callable[[int, int | None], None]
"""(model runs done, all of them if known), called before every model run; raises `service.Cancelled` to end the job."""


@dataclass(frozen=True)
class Drawing:
    """One drawn picture."""

    picture: Image.Image
    seed: int
    number: int
    """Of the candidate, from 0."""
    score: float | None
    """How likely the text is as the picture's caption, mean log-likelihood of its tokens; None if it was not asked."""
    notes: tuple[str, ...] = ()
    """What was changed on the way, a sentence each."""


@dataclass(frozen=True)
class Description:
    """One caption of a picture."""

    language: Language
    text: str
    score: float
    """Mean log-likelihood of its tokens; the higher, the surer."""


@dataclass(frozen=True)
class Facts:
    """What the page says about the run."""

    name: str
    device: str
    side: int
    """Pixels of a finished picture, each way; pictures are edited and captioned at this size."""
    styles: tuple[str, ...]
    """Names of styles; the first one is chosen at the start."""


class Engine(Protocol):
    """Does one job at a time; called from one thread."""

    facts: Facts

    def generate(
        self, text: str, style: str, seed: int, candidates: int, report: Report
    ) -> Sequence[Drawing]:
        """Draw `candidates` pictures for a text, the best one first."""
        ...

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
        """Redraw the box of a square picture of `facts.side` pixels, in `candidates` ways."""
        ...

    def caption(self, picture: Image.Image, seed: int, report: Report) -> Sequence[Description]:
        """Describe a square picture of `facts.side` pixels in every language."""
        ...
