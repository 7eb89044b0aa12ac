"""The engine over a real, tiny cascade: what the command line draws, exact progress, and stopping between model runs."""

from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig, VQVAEConfig
from cogview2.pipeline.config.sampling import SamplingConfig
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.vqvae.model import VQVAE
from cogview2.pipeline.sampling import editing, regions
from cogview2.pipeline.sampling.styles import find_style
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.pipeline.tokenizers.image import ImageTokenizer
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.stages.web.run_engine import RunEngine
from cogview2.stages.web.service import Cancelled

VOCABULARY = Vocabulary.uniform(20, 40)


class _Letters:
    """A text tokenizer: one id for each letter."""

    vocabulary = VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [26 + ord(letter) % 30 for letter in text if letter.isalpha()]


@pytest.fixture(scope="module")
def cascade() -> TextToImage:
    torch.manual_seed(0)
    base = CogLMConfig(layers=1, hidden=16, heads=2, max_positions=32, text_length=8, image_position=10)
    coglm = CogLM(base, VOCABULARY.rows)
    direct = DirectSR(base, DirectSRConfig(text_length=5), 4, 2, VOCABULARY.rows)
    iterative = IterativeSR(base, IterativeSRConfig(text_length=3), 8, VOCABULARY.rows)
    for model in (coglm, direct, iterative):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    vqvae = VQVAE(
        VQVAEConfig(
            base_channels=8,
            encoder_multipliers=(1, 1, 2),
            decoder_multipliers=((1, 1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 2)),
            encoder_res_blocks=1,
            latent_channels=8,
            codebook_size=20,
            norm_groups=4,
        )
    )
    return TextToImage(
        tokenizer=cast(TextTokenizer, _Letters()),
        coglm=coglm,
        direct=direct,
        iterative=iterative,
        image_tokenizer=ImageTokenizer(vqvae, 8),
        base_grid=4,
        sampling=SamplingConfig(batch=2),
        labels=torch.arange(20) % 5,
    )


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
