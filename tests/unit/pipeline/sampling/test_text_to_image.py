"""The facade: a picture depends on its prompt, seed and number alone."""

from typing import cast

import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig, VQVAEConfig
from cogview2.pipeline.config.sampling import SamplingConfig
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.vqvae.model import VQVAE
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.pipeline.tokenizers.image import ImageTokenizer
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

BASE = CogLMConfig(layers=1, hidden=16, heads=2, max_positions=32, text_length=8, image_position=10)
VOCABULARY = Vocabulary.uniform(20, 40)
PROMPTS = ["red", "a blue one", "x", "green"]


class _Letters:
    """A text tokenizer: one id for each letter."""

    vocabulary = VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [26 + ord(letter) % 30 for letter in text if letter.isalpha()]


def _randomized(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)


@pytest.fixture(scope="module")
def parts() -> dict[str, object]:
    torch.manual_seed(0)
    coglm = CogLM(BASE, VOCABULARY.rows)
    direct = DirectSR(BASE, DirectSRConfig(text_length=5), 4, 2, VOCABULARY.rows)
    iterative = IterativeSR(BASE, IterativeSRConfig(text_length=3), 8, VOCABULARY.rows)
    for model in (coglm, direct, iterative):
        _randomized(model)
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
    return dict(
        tokenizer=cast(TextTokenizer, _Letters()),
        coglm=coglm,
        direct=direct,
        iterative=iterative,
        image_tokenizer=ImageTokenizer(vqvae, 8),
        base_grid=4,
        labels=torch.arange(20) % 5,
    )


def _facade(parts: dict[str, object], batch: int = 16, **changes: object) -> TextToImage:
    return TextToImage(**(parts | {"sampling": SamplingConfig(batch=batch)} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 3])
def test_pictures_do_not_depend_on_the_batch(parts: dict[str, object], batch: int) -> None:
    whole = _facade(parts).draw(PROMPTS, seed=9)
    other = _facade(parts, batch).draw(PROMPTS, seed=9)
    for name in ("base_codes", "direct_codes", "final_codes"):
        assert torch.equal(getattr(whole, name), getattr(other, name))
    rest = _facade(parts, batch).draw(PROMPTS[2:], seed=9, first_number=2)
    assert torch.equal(rest.final_codes, whole.final_codes[2:])


def test_seed_and_number_change_the_picture(parts: dict[str, object]) -> None:
    facade = _facade(parts)
    codes = [facade.draw(["red"], seed, number).base_codes for seed, number in [(0, 0), (1, 0), (0, 1)]]
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


def test_pixels_of_every_pass(parts: dict[str, object]) -> None:
    drawn = _facade(parts, batch=3).draw(PROMPTS, seed=0)
    assert drawn.pictures == ("base", "direct", "final")
    assert drawn.pixels("base").shape == (4, 3, 32, 32)
    assert drawn.pixels("direct").shape == drawn.pixels().shape == (4, 3, 64, 64)
    assert 0 <= drawn.pixels().min() and drawn.pixels().max() <= 1


def test_without_super_resolution(parts: dict[str, object]) -> None:
    drawn = _facade(parts, direct=None, iterative=None).draw(PROMPTS, seed=0)
    assert drawn.direct_codes is None and torch.equal(drawn.final_codes, drawn.base_codes)
    assert torch.equal(drawn.pixels("final"), drawn.pixels("base"))
    with pytest.raises(DataError, match="no picture 'direct'"):
        drawn.pixels("direct")
    only_direct = _facade(parts, iterative=None).draw(PROMPTS, seed=0)
    assert only_direct.direct_codes is not None
    assert torch.equal(only_direct.final_codes, only_direct.direct_codes)


@pytest.mark.parametrize("prompts", [[], ["red", ""], ["  "]])
def test_nothing_to_draw_is_refused(parts: dict[str, object], prompts: list[str]) -> None:
    with pytest.raises(DataError, match="nothing to draw|is empty"):
        _facade(parts).draw(prompts, seed=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"direct": None}, "give the direct model too"),
        ({"base_grid": 5}, "from a grid of 4, CogLM draws 5"),
        ({"labels": torch.zeros(19, dtype=torch.int64)}, "the clusters 19"),
        (
            {"iterative": IterativeSR(BASE, IterativeSRConfig(text_length=3), 4, VOCABULARY.rows)},
            "gives a grid of 8, iterative needs 4",
        ),
    ],
)
def test_parts_that_do_not_belong_together(
    parts: dict[str, object], changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        _facade(parts, **changes)
