"""What turns pictures into features for the Frechet distance, and the choice of one from a path."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cogview2.pipeline.metrics.inception import InceptionFeatures
from cogview2.pipeline.metrics.inception_weights import load_inception
from cogview2.pipeline.metrics.resize import ResizeMode
from cogview2.pipeline.metrics.small_features import RandomConvFeatures


class FeatureNetwork(Protocol):
    """A fixed network; its name and weight hash stand beside every figure that it yields."""

    @property
    def name(self) -> str:
        """The network and everything else that changes its figures, such as the resize mode."""

    @property
    def dim(self) -> int:
        """Dimension of the features."""

    @property
    def comparable(self) -> bool:
        """Whether its figures may stand beside published ones."""

    @property
    def sha256(self) -> str:
        """Hash of its weights (of the file, where they come from one)."""

    def __call__(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return float32 features [B, dim] and class logits [B, classes] (None without classes).

        Args:
            images_BCHW: uint8 [B, 3, H, W] of any size.
        """


def build_feature_network(
    path: str | Path | None,
    resize: ResizeMode = "tf1",
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> FeatureNetwork:
    """Return the Inception network with the weights at `path`, or the small random one without a path.

    Args:
        path: see `inception_weights.load_inception` for the files that are understood.
        resize: how pictures are brought to 299x299; only for Inception.
        seed: of the random network.
        device: where the network computes.

    Raises:
        CheckpointError: the file cannot be used.
    """
    if path is None:
        return RandomConvFeatures(seed, device=device)
    loaded = load_inception(Path(path))
    return InceptionFeatures(
        loaded.network.to(device), loaded.kind, resize, sha256=loaded.sha256, comparable=loaded.published
    )
