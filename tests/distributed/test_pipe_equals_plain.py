"""Two gloo ranks: the pipelined CogLM on two pipe stages trains as the plain one under ZeRO-1 does."""

import deepspeed
import deepspeed.comm
import numpy as np
import pytest
import torch
from forked_ranks import run_ranks
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.data.objectives import Sample, compose_row, generation_sample, understanding_sample
from cogview2.pipeline.models.coglm.loss import PART_NAMES, LabelRanges, coglm_loss
from cogview2.pipeline.models.coglm.masks import attention_mask
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.coglm.pipe import PipeLoss, build_pipeline_module, load_plain_state, plain_name
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

pytestmark = pytest.mark.distributed
WORLD, STEPS, MICRO_BATCHES = 2, 3, 4
GRID, TEXT = 4, 8
VOCABULARY = Vocabulary.uniform(40, 60)
CONFIG = CogLMConfig(
    layers=3, hidden=32, heads=4, max_positions=64, text_length=TEXT, image_position=16, dropout=0.0
)
RANGES = LabelRanges((0, 40), VOCABULARY.english, VOCABULARY.chinese)
Batch = list[torch.Tensor]


class PlainLoss(nn.Module):
    """CogLM with its loss."""

    def __init__(self, model: CogLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens, position_ids, roles, labels, loss_mask, loss_weights):  # noqa: ANN001, ANN201
        hidden = self.model(tokens, position_ids, attention_mask(roles))
        words = self.model.transformer.word_embeddings.weight
        return coglm_loss(hidden, words, labels, loss_mask, RANGES, loss_weights)


def _sample(rng: np.random.Generator) -> Sample:
    low, high = VOCABULARY.english[0], VOCABULARY.chinese[1]
    captions = [rng.integers(low, high, 3).tolist(), rng.integers(low, high, 2).tolist()]
    row = compose_row(captions, rng.integers(0, 40, GRID**2), TEXT, VOCABULARY)
    build = generation_sample if rng.random() < 0.5 else understanding_sample
    return build(row, rng, loss_normalisation="region", config=CONFIG, vocabulary=VOCABULARY)


def _batches(step: int) -> list[Batch]:
    rng = np.random.default_rng(step)
    groups = [[_sample(rng) for _ in range(2)] for _ in range(MICRO_BATCHES)]
    fields = ("tokens", "position_ids", "roles", "labels", "loss_mask", "loss_weights")
    return [
        [torch.from_numpy(np.stack([getattr(sample, name) for sample in group])) for name in fields]
        for group in groups
    ]


def _deepspeed_config(accumulation: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }


def _train_plain(state: dict[str, torch.Tensor], rank: int) -> dict:
    model = CogLM(CONFIG, VOCABULARY.rows)
    model.load_state_dict(state)
    accumulation = MICRO_BATCHES // WORLD
    engine, *_ = deepspeed.initialize(
        model=PlainLoss(model),
        model_parameters=list(model.parameters()),
        config=_deepspeed_config(accumulation),
    )
    losses, norms = [], []
    split = torch.zeros(2, len(PART_NAMES))
    for step in range(STEPS):
        total = torch.zeros(())
        split.zero_()
        for batch in _batches(step)[rank::WORLD]:
            parts = engine(*batch)
            engine.backward(parts.loss)
            engine.step()
            total += parts.loss.detach() / MICRO_BATCHES
            split += torch.stack([parts.sums, parts.counts])
        deepspeed.comm.all_reduce(total)
        deepspeed.comm.all_reduce(split)
        losses.append(float(total))
        norms.append(float(engine.get_global_grad_norm()))
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {"losses": losses, "norms": norms, "split": split / MICRO_BATCHES, "weights": weights}


def _train_pipe(state: dict[str, torch.Tensor], checkpointed: int) -> dict:
    module = build_pipeline_module(
        CONFIG, VOCABULARY.rows, 2, PipeLoss(RANGES), activation_checkpoint_interval=checkpointed
    )
    load_plain_state(module, state, CONFIG)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config=_deepspeed_config(MICRO_BATCHES)
    )
    losses, norms = [], []
    for step in range(STEPS):
        micro = iter([(tuple(batch[:3]), tuple(batch[3:])) for batch in _batches(step)])
        losses.append(float(engine.train_batch(data_iter=micro)))
        norms.append(float(engine.get_global_grad_norm()))
    extra = engine.get_additional_losses()
    split = [[float(extra[f"{name}_{kind}"]) for name in PART_NAMES] for kind in ("loss_sum", "labels")]
    weights = {
        plain_name(name, CONFIG): tensor.detach().clone() for name, tensor in module.state_dict().items()
    }
    return {"losses": losses, "norms": norms, "split": torch.tensor(split), "weights": weights}


def _work(rank: int) -> dict:
    torch.manual_seed(0)
    state = CogLM(CONFIG, VOCABULARY.rows).state_dict()
    results = {"plain": _train_plain(state, rank)}
    results["pipe"] = _train_pipe(state, 0)
    results["checkpointed"] = _train_pipe(state, 1)
    names = [None] * WORLD
    torch.distributed.all_gather_object(names, sorted(results["pipe"]["weights"]))
    results["all_names"] = set().union(*map(set, names))
    return results


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return run_ranks(_work, WORLD)


@pytest.mark.parametrize("kind", ["pipe", "checkpointed"])
def test_losses_and_gradient_norms_are_equal(results: list[dict], kind: str) -> None:
    plain = results[0]["plain"]
    assert plain["losses"][-1] < plain["losses"][0]
    for answer in results:
        np.testing.assert_allclose(answer[kind]["losses"], plain["losses"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(answer[kind]["norms"], plain["norms"], rtol=1e-4)


@pytest.mark.parametrize("kind", ["pipe", "checkpointed"])
def test_split_of_the_loss_is_equal(results: list[dict], kind: str) -> None:
    for answer in results:
        np.testing.assert_allclose(answer[kind]["split"], results[0]["plain"]["split"], rtol=1e-4, atol=1e-4)


def test_weights_after_training_are_equal(results: list[dict]) -> None:
    plain = results[0]["plain"]["weights"]
    assert results[0]["all_names"] == set(plain)
    for answer in results:
        assert 0 < len(answer["pipe"]["weights"]) < len(plain)
        for name, tensor in answer["pipe"]["weights"].items():
            np.testing.assert_allclose(tensor, plain[name], atol=2e-4, rtol=0, err_msg=name)
