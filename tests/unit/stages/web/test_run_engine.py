"""The engine over a real, tiny cascade: what the command line draws, exact progress, and stopping between model runs."""

import numpy as np
import pytest
from PIL import Image
from tiny_cascade import facade, make_parts

from cogview2.pipeline.sampling import editing, regions
from cogview2.pipeline.sampling.styles import find_style
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.stages.web.run_engine import RunEngine
from cogview2.stages.web.service import Cancelled


@pytest.fixture(scope="module")
def cascade() -> TextToImage:
    return facade(make_parts(), batch=2)


class _Progress:
    """Notes every report; asks to stop at the run `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.reports: list[tuple[int, int | None]] = []
        self.stop_at = stop_at

    def __call__(self, done: int, total: int | None) -> None:
        if done == self.stop_at:
            raise Cancelled
        self.reports.append((done, total))


def test_facts_are_those_of_the_models(cascade: TextToImage) -> None:
    facts = RunEngine("tiny", cascade).facts
    assert (facts.name, facts.device, facts.side) == ("tiny", "CPU", 64)
    assert facts.styles[0] == "none" and {"oil", "flat"} < set(facts.styles)


@pytest.mark.parametrize("style", ["none", "flat"])
def test_it_draws_what_the_cascade_draws(cascade: TextToImage, style: str) -> None:
    (drawing,) = RunEngine("tiny", cascade).generate("red", style, 7, 1, _Progress())
    pixels_13HW = cascade.draw(["red"], 7, style=find_style(style)).pixels()
    expected = (pixels_13HW[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(drawing.picture), expected)
    assert (drawing.seed, drawing.number, drawing.score) == (7, 0, None)


@pytest.mark.parametrize(
    ("candidates", "total"), [(1, 16 + 1 + 6), (2, 16 + 1 + 6 + 1), (3, 2 * (16 + 1 + 6 + 1))]
)
def test_progress_ends_exactly_at_the_total(cascade: TextToImage, candidates: int, total: int) -> None:
    progress = _Progress()
    drawings = RunEngine("tiny", cascade).generate("red", "none", 7, candidates, progress)
    assert progress.reports == [(done, total) for done in range(total)]
    assert sorted(drawing.number for drawing in drawings) == list(range(candidates))
    scores = [drawing.score for drawing in drawings if drawing.score is not None]
    assert scores == sorted(scores, reverse=True) and len(scores) == (0 if candidates == 1 else candidates)


def test_a_stopped_job_runs_no_further_and_leaves_nothing_behind(cascade: TextToImage) -> None:
    engine, progress = RunEngine("tiny", cascade), _Progress(stop_at=5)
    with pytest.raises(Cancelled):
        engine.generate("red", "none", 7, 1, progress)
    assert len(progress.reports) == 5
    assert len(engine.generate("red", "none", 7, 1, _Progress())) == 1
    assert len(progress.reports) == 5
    for model in (cascade.coglm, cascade.direct, cascade.iterative):
        assert model is not None and not model._forward_pre_hooks


def test_a_box_is_redrawn_as_by_editing(cascade: TextToImage) -> None:
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    progress = _Progress()
    drawings = RunEngine("tiny", cascade).edit(picture, (8, 16, 40, 48), "blue", "none", 3, 2, progress)
    edited = editing.edit(cascade, picture, regions.Box(8, 16, 40, 48), "blue", seed=3, candidates=2)
    assert [drawing.number for drawing in drawings] == list(edited.numbers)
    for drawing, pixels in zip(drawings, edited.pictures, strict=True):
        assert np.array_equal(np.asarray(drawing.picture), pixels)
    assert progress.reports and all(total is None for _, total in progress.reports)


def test_an_edit_in_a_style_scores_the_text_alone(cascade: TextToImage) -> None:
    picture, box = Image.new("RGB", (64, 64), "white"), (8, 16, 40, 48)
    drawings = RunEngine("tiny", cascade).edit(picture, box, "blue", "oil", 3, 2, _Progress())
    style = find_style("oil")
    expected = editing.edit(cascade, picture, regions.Box(*box), "blue", seed=3, candidates=2, style=style)
    assert expected.scores is not None
    assert [drawing.score for drawing in drawings] == expected.scores.tolist()
