"""The loss is a mean over the global batch, however it is cut into micro batches (ranks: tests/distributed)."""

from typing import Any

import numpy as np
import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.data.objectives import direct_sr_sample, iterative_sr_sample
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.modules import Batch, TrainModule
from cogview2.pipeline.training.normalisation import mean_mass, weight_mass
from cogview2.pipeline.training.train_modules.coglm import CogLMTrainModule
from cogview2.pipeline.training.train_modules.sr import DirectSRTrainModule, IterativeSRTrainModule

VOCABULARY = Vocabulary.uniform(16, 40)
CONFIG = CogLMConfig(
    layers=2, hidden=16, heads=2, max_positions=64, text_length=6, image_position=8, dropout=0.0, init_std=0.2
)


def coglm() -> tuple[TrainModule, list[Batch]]:
    def sample(positions: int) -> Batch:
        tokens = torch.randint(0, VOCABULARY.rows, (1, 22))
        return {
            "tokens": tokens,
            "position_ids": torch.arange(22)[None],
            "labels": tokens.roll(-1, 1),
            "loss_mask": torch.arange(22)[None] < positions,
            "loss_weights": torch.rand(1, 22),
            "roles": torch.ones(1, 22, dtype=torch.int64),
        }

    return CogLMTrainModule(CONFIG, VOCABULARY), [sample(count) for count in (1, 21, 3, 0)]


def superres(kind: str) -> tuple[TrainModule, list[Batch]]:
    rng = np.random.default_rng(0)
    made: list[Any] = []
    for _ in range(4):
        base, fine = rng.integers(0, 16, 4), rng.integers(0, 16, 16)
        common: dict[str, Any] = {"coglm": CONFIG, "vocabulary": VOCABULARY}
        if kind == "direct":
            made.append(
                direct_sr_sample([20, 21], base, fine, config=DirectSRConfig(text_length=4), **common)
            )
        else:
            made.append(
                iterative_sr_sample([20], fine, rng, config=IterativeSRConfig(text_length=4), **common)
            )
    fields = ("tokens", "position_ids", "labels", "loss_mask", "roles")
    batches = [{name: torch.from_numpy(getattr(sample, name))[None] for name in fields} for sample in made]
    if kind == "direct":
        model = DirectSR(CONFIG, DirectSRConfig(text_length=4), 2, 2, VOCABULARY.rows)
        return DirectSRTrainModule(model, VOCABULARY), batches
    return IterativeSRTrainModule(
        IterativeSR(CONFIG, IterativeSRConfig(text_length=4), 4, VOCABULARY.rows), VOCABULARY
    ), batches


def gradients(module: TrainModule, micro_batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    module.zero_grad()
    module.begin_step(0, micro_batches)
    losses = [module(batch).loss / len(micro_batches) for batch in micro_batches]
    torch.stack(losses).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return float(sum(losses)), {name: grad.clone() for name, grad in found.items()}


@pytest.mark.parametrize("kind", ["coglm", "direct", "iterative"])
def test_micro_batches_of_unequal_mass_add_up_to_the_whole(kind: str) -> None:
    torch.manual_seed(0)
    module, samples = coglm() if kind == "coglm" else superres(kind)
    whole = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
    loss, expected = gradients(module, [whole])
    for size in (1, 2):
        cut = [{name: value[k : k + size] for name, value in whole.items()} for k in range(0, 4, size)]
        ours, found = gradients(module, cut)
        assert ours == pytest.approx(loss, rel=1e-6)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["coglm", "direct", "iterative"])
def test_one_micro_batch_alone_has_its_own_mean_bit_for_bit(kind: str) -> None:
    torch.manual_seed(0)
    module, samples = coglm() if kind == "coglm" else superres(kind)
    alone = module(samples[1]).loss
    module.begin_step(0, samples[1:2])
    assert torch.equal(module(samples[1]).loss, alone)


def test_masses() -> None:
    mask = torch.tensor([[True, False, True]])
    weights = torch.tensor([[0.25, 9.0, 0.5]])
    assert weight_mass(mask, weights).item() == 0.75 and weight_mass(mask).item() == 2.0
    mean = mean_mass([weight_mass(mask, weights), weight_mass(~mask, weights)])
    assert mean.dtype == torch.float32 and mean.item() == (0.75 + 9.0) / 2


def test_a_step_without_any_loss_position_is_no_fault() -> None:
    module, samples = coglm()
    loss, found = gradients(module, samples[3:])
    assert loss == 0.0 and all(not gradient.any() for gradient in found.values())
