"""A whole cascade of tiny random networks: 4x4 base codes, 8x8 fine ones, 64 pixels."""

from typing import cast

import torch
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig, VQVAEConfig
from cogview2.pipeline.config.sampling import SamplingConfig
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


class Letters:
    """A text tokenizer: one id for each letter."""

    vocabulary = VOCABULARY

    def encode(self, text: str) -> list[int]:
        """Return the ids of the letters; all else is left out."""
        return [26 + ord(letter) % 30 for letter in text if letter.isalpha()]


def randomize(model: nn.Module) -> None:
    """Draw weights large enough that inputs matter."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)


def make_parts() -> dict[str, object]:
    """Return the arguments of a TextToImage but for `sampling`, the same ones every time."""
    torch.manual_seed(0)
    coglm = CogLM(BASE, VOCABULARY.rows)
    direct = DirectSR(BASE, DirectSRConfig(text_length=5), 4, 2, VOCABULARY.rows)
    iterative = IterativeSR(BASE, IterativeSRConfig(text_length=3), 8, VOCABULARY.rows)
    for model in (coglm, direct, iterative):
        randomize(model)
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
    return {
        "tokenizer": cast(TextTokenizer, Letters()),
        "coglm": coglm,
        "direct": direct,
        "iterative": iterative,
        "image_tokenizer": ImageTokenizer(vqvae, 8),
        "base_grid": 4,
        "labels": torch.arange(20) % 5,
    }


def facade(parts: dict[str, object], batch: int = 16, **changes: object) -> TextToImage:
    """Return the parts as a cascade, with other ones in the place of some."""
    return TextToImage(**(parts | {"sampling": SamplingConfig(batch=batch)} | changes))  # type: ignore[arg-type]
