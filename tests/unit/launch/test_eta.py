"""When the cascade will be done: the running stage's own time, and operations over its FLOP/s for those after it."""

import pytest

from cogview2.launch.eta import CascadeEta, cascade_eta, training_flops
from cogview2.pipeline.config.cost import train_flops_per_sample
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.stages import STAGES
from cogview2.pipeline.stage_dir import Heartbeat

FLOPS = {
    "train_vqvae": 5e12,
    "pretrain_coglm": 60e12,
    "finetune_superres/direct": 20e12,
    "finetune_superres/iterative": 10e12,
}


def beat(stage: str, eta: float | None = 100.0, **meters: float) -> Heartbeat:
    return Heartbeat(stage, 1, 10, None, None, "", eta, "", 0.0, meters)


@pytest.mark.parametrize(
    ("stage", "seconds"),
    [
        ("train_vqvae", 100 + 90 / 0.5),
        ("pretrain_coglm", 100 + 30 / 0.5),
        ("finetune_superres/direct", 100 + 10 / 0.5),
    ],
)
def test_later_units_take_their_operations_over_the_measured_rate(stage: str, seconds: float) -> None:
    assert cascade_eta(beat(stage, model_tflops=0.5), FLOPS) == CascadeEta(seconds, whole=True)


def test_without_a_rate_it_is_a_lower_bound() -> None:
    found = cascade_eta(beat("train_vqvae", 3600.0), FLOPS)
    assert str(found) == "cascade eta >= 1 h 0 min"
    assert str(cascade_eta(beat("train_vqvae", 3600.0, model_tflops=90 / 14400), FLOPS)) == (
        "cascade eta ~5 h 0 min"
    )


def test_nothing_is_said_where_nothing_follows_or_nothing_is_known() -> None:
    assert cascade_eta(None, FLOPS) is None
    assert cascade_eta(beat("train_vqvae", None), FLOPS) is None
    assert cascade_eta(beat("finetune_superres/iterative", model_tflops=1.0), FLOPS) is None
    assert cascade_eta(beat("shard_dataset", model_tflops=1.0), FLOPS) is None


def test_operations_of_the_selected_units() -> None:
    recipe = load_recipe("quickstart", [])
    found = training_flops(recipe, list(STAGES))
    assert list(found) == list(FLOPS)
    train = recipe.coglm.train
    per_sample = train_flops_per_sample(recipe, "pretrain_coglm")
    assert found["pretrain_coglm"] == per_sample * train.global_batch * train.steps > 1e12
    assert list(training_flops(recipe, ("evaluate", "pretrain_coglm"))) == ["pretrain_coglm"]
    taken = load_recipe("quickstart", ["vqvae.take_from=elsewhere"])
    assert "train_vqvae" not in training_flops(taken, list(STAGES))
