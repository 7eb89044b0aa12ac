"""Reconstruction losses: agreement with torchmetrics, safe gradients, the VGG16 loader and its stand-in."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from cogview2.pipeline.errors import CheckpointError, DataError
from cogview2.pipeline.models.vqvae import losses
from cogview2.pipeline.models.vqvae.losses import GradientPerceptual, VGGPerceptual, build_perceptual


def _pair(side: int, noise: float, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(batch, 3, side // 8, side // 8, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return x, (x + noise * torch.randn(x.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize(
    ("side", "scales"),
    [(11, 1), (20, 1), (21, 2), (40, 2), (64, 3), (80, 3), (81, 4), (160, 4), (161, 5), (480, 5)],
)
def test_number_of_scales(side: int, scales: int) -> None:
    assert losses.ms_ssim_scales(side) == scales


@pytest.mark.parametrize("noise", [0.02, 0.2])
@pytest.mark.parametrize("side", [176, 256])
def test_ms_ssim_equals_torchmetrics(side: int, noise: float) -> None:
    x, y = _pair(side, noise, batch=2)
    expected = multiscale_structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(losses.ms_ssim(x, y), expected, rtol=0, atol=1e-4)
    assert expected.max() < 0.999


def test_fewer_scales_use_renormalised_weights() -> None:
    x, y = _pair(64, 0.1)
    weights = torch.tensor(losses.SSIM_WEIGHTS[:3])
    betas = tuple((weights / weights.sum()).tolist())
    expected = multiscale_structural_similarity_index_measure(x, y, data_range=1.0, betas=betas)
    torch.testing.assert_close(losses.ms_ssim(x, y).mean(), expected, rtol=0, atol=1e-4)


def test_ms_ssim_orders_small_pictures() -> None:
    x, slightly = _pair(64, 0.02)
    _, badly = _pair(64, 0.3)
    values = [losses.ms_ssim_loss(other, x).item() for other in (x, slightly, badly, 1 - x)]
    assert values[0] == pytest.approx(0, abs=1e-5)
    assert values == sorted(values) and values[-1] < 1


@pytest.mark.parametrize("case", ["equal", "inverted", "constant", "noise"])
def test_ms_ssim_gradients_are_finite(case: str) -> None:
    target = _pair(64, 0.1)[0]
    start = {
        "equal": target,
        "inverted": 1 - target,
        "constant": torch.zeros_like(target),
        "noise": torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) * 4 - 2,
    }[case]
    x = start.clone().requires_grad_()
    losses.ms_ssim_loss(x, target).backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_ms_ssim_is_float32_under_autocast() -> None:
    x, y = _pair(64, 0.05)
    expected = losses.ms_ssim(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.ms_ssim(x, y), expected)


def test_ms_ssim_refuses() -> None:
    with pytest.raises(DataError, match="at least 11 pixels a side, not 10"):
        losses.ms_ssim(torch.rand(1, 3, 10, 64), torch.rand(1, 3, 10, 64))
    with pytest.raises(DataError, match=r"\[1, 3, 64, 64\] and \[2, 3, 64, 64\]"):
        losses.ms_ssim(torch.rand(1, 3, 64, 64), torch.rand(2, 3, 64, 64))


def test_l1() -> None:
    assert losses.l1_loss(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])) == 1.5


def test_gradient_perceptual() -> None:
    loss = GradientPerceptual()
    ramp = torch.arange(16.0).view(1, 1, 1, 16).expand(1, 3, 16, 16) / 16
    flat = torch.zeros(1, 3, 16, 16)
    assert loss(ramp, ramp) == 0 and loss(ramp, ramp + 0.3) == pytest.approx(0, abs=1e-6)
    # Steps of 1/16, 2/16, 4/16 in one direction at the three scales.
    assert loss(ramp, flat) == pytest.approx((1 + 2 + 4) / 16 / 3)
    x, blurred = _pair(32, 0.1)
    assert loss(blurred, x) > 0


def _vgg_state(width: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A trunk of the same depth with narrow layers, so that the tests are fast."""
    narrow = tuple(tuple(width for _ in block) for block in losses.VGG_CHANNELS)
    monkeypatch.setattr(losses, "VGG_CHANNELS", narrow)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.3 for name, shape in losses._vgg_shapes().items()
    }


def test_vgg_names_are_those_of_torchvision() -> None:
    shapes = losses._vgg_shapes()
    convolutions = [int(name.split(".")[1]) for name in shapes if name.endswith("weight")]
    assert convolutions == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert shapes["features.17.weight"] == (512, 256, 3, 3) and shapes["features.28.bias"] == (512,)


def test_vgg_equals_a_plain_sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    state = _vgg_state(4, monkeypatch)
    loss = VGGPerceptual(state)
    x, y = _pair(32, 0.2)
    layers: list[torch.nn.Module] = []
    for block in losses.VGG_CHANNELS:
        for width in block:
            layers += [torch.nn.Conv2d(4 if layers else 3, width, 3, padding=1), torch.nn.ReLU()]
        layers.append(torch.nn.MaxPool2d(2))
    trunk = torch.nn.Sequential(*layers)
    trunk.load_state_dict({name.removeprefix("features."): tensor for name, tensor in state.items()})

    def maps(pixels: torch.Tensor) -> list[torch.Tensor]:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (losses.IMAGENET_MEAN, losses.IMAGENET_STD))
        h, found = (pixels - mean) / std, []
        for index, layer in enumerate(trunk):
            h = layer(h)
            if index in (3, 8, 15, 22, 29):
                found.append(torch.nn.functional.normalize(h, dim=1))
        return found

    expected = sum((a - b).square().sum(dim=1).mean() for a, b in zip(maps(x), maps(y), strict=True))
    torch.testing.assert_close(loss(x, y), expected, rtol=1e-4, atol=1e-5)
    assert loss(x, x) == 0 and loss.name == "vgg16" and list(loss.parameters()) == []


def test_vgg_gradient_goes_to_the_first_picture_only(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = VGGPerceptual(_vgg_state(4, monkeypatch))
    x, y = (image.requires_grad_() for image in _pair(32, 0.2))
    loss(x, y).backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    assert y.grad is None


def test_vgg_gradient_is_finite_where_all_features_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {name: -tensor.abs() for name, tensor in _vgg_state(4, monkeypatch).items()}
    x = torch.ones(1, 3, 16, 16, requires_grad=True)
    VGGPerceptual(state)(x, torch.zeros(1, 3, 16, 16)).backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_vgg_heads_weight_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    state = _vgg_state(4, monkeypatch)
    x, y = _pair(32, 0.2)
    doubled = state | {f"lin{k}.model.1.weight": torch.full((1, 4, 1, 1), 2.0) for k in range(5)}
    with_heads = VGGPerceptual(doubled)
    torch.testing.assert_close(with_heads(x, y), 2 * VGGPerceptual(state)(x, y))
    assert with_heads.name == "vgg16-lpips"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_build_from_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = _vgg_state(4, monkeypatch) | {"classifier.0.weight": torch.zeros(2, 2)}
    path = tmp_path / f"vgg16{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert build_perceptual(str(path)).name == "vgg16"


def test_build_without_a_file_names_the_stand_in(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loss = build_perceptual(None)
    assert isinstance(loss, GradientPerceptual) and loss.name == "gradient"
    assert "'gradient'" in caplog.text and "vqvae.perceptual_network" in caplog.text


def test_wrong_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = _vgg_state(4, monkeypatch)
    wrong = {
        "missing": ({k: v for k, v in state.items() if k != "features.5.bias"}, "missing: features.5.bias"),
        "shape": (
            state | {"features.0.weight": torch.zeros(4, 1, 3, 3)},
            r"features.0.weight is \[4, 1, 3, 3\]",
        ),
        "heads": (
            state | {"lin0.model.1.weight": torch.zeros(1, 4, 1, 1)},
            "missing: lin1.model.1.weight, lin2",
        ),
        "list": ([1, 2], "holds a list, not a state dict"),
    }
    for name, (content, message) in wrong.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            build_perceptual(str(path))
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"not a pickle")
    for path in (damaged, tmp_path / "absent.pth"):
        with pytest.raises(CheckpointError, match=f"cannot read VGG16 weights from {path}"):
            build_perceptual(str(path))


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "pwned"),))

    path = tmp_path / "attack.pth"
    torch.save({"features.0.weight": Attack()}, path)
    with pytest.raises(CheckpointError, match="cannot read"):
        build_perceptual(str(path))
    assert not (tmp_path / "pwned").exists()
