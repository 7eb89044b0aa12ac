"""What the meters are told of a stage's work."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cogview2.pipeline.config import cost
from cogview2.pipeline.config.loading import load_recipe
from cogview2.stages._work import product_kind, work_of


def context(device: str, *overrides: str) -> Any:
    recipe = load_recipe("cogview2_6b", list(overrides))
    return SimpleNamespace(recipe=recipe, world=SimpleNamespace(device=torch.device(device)))


def test_the_formulas_and_no_peak_on_a_cpu() -> None:
    asked = context("cpu", "launch.hardware=h100_80")
    work = work_of(asked, "pretrain_coglm")
    assert work.peak_flops_per_rank is None and work.tokens_per_sample == 512
    assert work.images_per_sample == 1.0
    # 6 FLOPs a parameter and token, and a little for attention and the head.
    assert 6 * 5.4e9 * 512 < work.flops_per_sample < 6 * 6.5e9 * 512
    vqvae, last = work_of(asked, "train_vqvae"), work_of(asked, "finetune_superres/iterative")
    assert vqvae.tokens_per_sample is None
    # CogLM is nearly all of what is to come after the VQVAE, and nothing comes after the last.
    coglm = work.flops_per_sample * asked.recipe.coglm.train.global_batch * asked.recipe.coglm.train.steps
    assert coglm < vqvae.later_flops < 1.1 * coglm and last.later_flops == 0


def test_the_peak_of_the_device_in_the_precision_of_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert work_of(context("cuda"), "pretrain_coglm").peak_flops_per_rank == 989e12
    assert work_of(context("cuda"), "train_vqvae").peak_flops_per_rank == 494e12
    named = context("cuda", "launch.hardware=a100_40")
    assert work_of(named, "pretrain_coglm").peak_flops_per_rank == 312e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "something new")
    assert work_of(context("cuda"), "pretrain_coglm").peak_flops_per_rank is None


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("quickstart", {"fp32", "tf32"}), ("cogview2_6b", {"bf16", "tf32"})],
)
def test_kinds(name: str, kinds: set[str]) -> None:
    recipe = load_recipe(name, [])
    assert {product_kind(recipe, unit) for unit in cost.UNITS} == kinds
