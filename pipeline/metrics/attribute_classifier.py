"""A small classifier of what a drawing shows: it judges drawings, and is a feature network of its own."""

import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.metrics.resize import resize_antialias
from cogview2.pipeline.metrics.small_features import check_images

_SIDE = 64
_WIDTHS = (3, 16, 32, 64, 64)
_FEATURES = 64
_CHUNK = 256
_LEARNING_RATE = 3e-3
_MAX_JOINT_CLASSES = 1_000_000
ABSENT = -1
"""Label of an attribute that a picture does not have; it counts neither in training nor in accuracy."""


def _small(images_BCHW: Tensor) -> Tensor:
    """Bring uint8 pictures [B, 3, H, W] to uint8 [B, 3, 64, 64]."""
    check_images(images_BCHW)
    if images_BCHW.shape[2:] == (_SIDE, _SIDE):
        return images_BCHW
    return resize_antialias(images_BCHW, _SIDE).round().clamp(0, 255).to(torch.uint8)


class _Network(nn.Module):
    """Four strided convolutions, a 64-d layer, and one linear output for each attribute."""

    def __init__(self, classes: dict[str, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for incoming, outgoing in zip(_WIDTHS, _WIDTHS[1:], strict=False):
            layers += [
                nn.Conv2d(incoming, outgoing, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outgoing),
                nn.ReLU(),
            ]
        side = _SIDE >> (len(_WIDTHS) - 1)
        # Flattened, not pooled: where an object is matters.
        layers += [nn.Flatten(), nn.Linear(_WIDTHS[-1] * side * side, _FEATURES), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(_FEATURES, count) for count in classes.values())

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return features [B, 64] and the logits [B, classes] of each attribute."""
        features_BD = self.trunk(pixels_BCHW.float() / 127.5 - 1)
        return features_BD, [head(features_BD) for head in self.heads]


class AttributeClassifier:
    """Predicts each attribute of a picture; as a `FeatureNetwork`, its logits are over all combinations."""

    dim = _FEATURES
    comparable = False

    def __init__(self, classes: dict[str, int], seed: int, *, device: torch.device | str = "cpu") -> None:
        """Make an untrained classifier.

        Args:
            classes: attribute -> number of its classes.
            seed: of the initial weights.
            device: where it computes.

        Raises:
            DataError: no attribute, an attribute without classes, or too many combinations.
        """
        if not classes or min(classes.values()) < 1:
            raise DataError(f"the classifier needs attributes with one class or more, not {classes}")
        if math.prod(classes.values()) > _MAX_JOINT_CLASSES:
            raise DataError(
                f"{classes} have {math.prod(classes.values())} combinations, more than "
                f"{_MAX_JOINT_CLASSES}; leave out attributes"
            )
        self.classes = dict(classes)
        self.name = f"drawing-attributes-{self.dim} (seed {seed}), not comparable to papers"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = _Network(self.classes).eval()
        self.network.to(device)
        self.device = torch.device(device)

    @property
    def sha256(self) -> str:
        """Hash of the present weights."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def _outputs(self, images_BCHW: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        for part_BCHW in images_BCHW.split(_CHUNK):
            yield self.network(_small(part_BCHW.to(self.device)))

    def __call__(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, 64] and logits [B, product of the classes]; see `FeatureNetwork`.

        The attributes are taken as independent given the picture, so joint log probabilities are sums. The
        last attribute varies fastest.
        """
        check_images(images_BCHW)
        all_features, all_logits = [], []
        for features_BD, logits in self._outputs(images_BCHW):
            joint_BK = torch.zeros(len(features_BD), 1, device=self.device)
            for each_BK in logits:
                joint_BK = (joint_BK[:, :, None] + F.log_softmax(each_BK, dim=1)[:, None, :]).flatten(1)
            all_features.append(features_BD)
            all_logits.append(joint_BK)
        return torch.cat(all_features), torch.cat(all_logits)

    def predict(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the most probable class of each attribute, int64 [B], of uint8 pictures [B, 3, H, W]."""
        check_images(images_BCHW)
        parts = [[each_BK.argmax(1) for each_BK in logits] for _, logits in self._outputs(images_BCHW)]
        return {
            name: torch.cat([part[index] for part in parts]).cpu() for index, name in enumerate(self.classes)
        }

    def accuracy(self, images_BCHW: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
        """Return for each attribute the share of pictures that have it and are predicted right."""
        predicted = self.predict(images_BCHW)
        shares = {}
        for name, label_B in labels.items():
            present_B = label_B.cpu() != ABSENT
            right_B = (predicted[name] == label_B.cpu()) & present_B
            shares[name] = float(right_B.sum() / present_B.sum().clamp(min=1))
        return shares


def _checked_classes(count: int, labels: dict[str, Tensor], classes: dict[str, int] | None) -> dict[str, int]:
    if not count:
        raise DataError("the attribute classifier has no pictures to train on")
    found: dict[str, int] = {}
    for name, label_M in labels.items():
        if label_M.shape != (count,) or label_M.is_floating_point():
            raise DataError(
                f"labels {name!r} are {label_M.dtype} {tuple(label_M.shape)}; they must be integers [{count}]"
            )
        found[name] = max(int(label_M.max()), 0) + 1
        most = found[name] if classes is None else classes.get(name, 0)
        if int(label_M.min()) < ABSENT or found[name] > most:
            raise DataError(
                f"labels {name!r} lie in [{int(label_M.min())}, {int(label_M.max())}]; they must be "
                f"in [0, {most}), or {ABSENT} where absent"
            )
    return found if classes is None else {name: classes[name] for name in labels}


def train(
    images_MCHW: Tensor,
    labels: dict[str, Tensor],
    *,
    steps: int,
    batch: int,
    seed: int,
    classes: dict[str, int] | None = None,
    device: torch.device | str = "cpu",
    each_step: Callable[[], None] = lambda: None,
) -> AttributeClassifier:
    """Train a classifier; on a CPU equal arguments and thread counts give equal weights.

    Args:
        images_MCHW: uint8 [M, 3, H, W]; any size but 64x64 is resampled to it.
        labels: attribute -> int64 [M], `ABSENT` where a picture does not have the attribute.
        steps: optimizer updates.
        batch: pictures in each; drawn anew for each step.
        seed: of weights and batches.
        classes: attribute -> number of classes; by default the largest label + 1.
        device: where to compute.
        each_step: called before each step; what it raises ends the training.

    Raises:
        DataError: no pictures, or labels that do not fit.
    """
    counts = _checked_classes(len(images_MCHW), labels, classes)
    classifier = AttributeClassifier(counts, seed, device=device)
    small_MCHW = torch.cat([_small(part) for part in images_MCHW.split(_CHUNK)]).to(device)
    targets = [labels[name].to(device, torch.int64) for name in counts]
    network = classifier.network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE)
    generator = np.random.default_rng(seed)
    size = min(batch, len(small_MCHW))
    for step in range(steps):
        each_step()
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * (1 - step / steps)
        chosen = torch.from_numpy(generator.choice(len(small_MCHW), size, replace=False)).to(device)
        _, logits = network(small_MCHW[chosen])
        loss = torch.zeros((), device=device)
        for each_BK, target_M in zip(logits, targets, strict=True):
            target_B = target_M[chosen]
            # The sum over present labels: the mean of none is NaN.
            total = F.cross_entropy(each_BK, target_B, ignore_index=ABSENT, reduction="sum")
            loss = loss + total / (target_B != ABSENT).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    return classifier
