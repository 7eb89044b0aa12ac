"""The cascade on a device: the same logits as on the CPU in every precision, the same pictures for a seed, and its cost."""

import pytest
import torch

pytest.importorskip("pydantic", reason="needs pydantic, for the sizes of models")
pytest.importorskip("sentencepiece", reason="needs sentencepiece, for the text tokenizer's module")
pytest.importorskip("yaml", reason="needs PyYAML, for styles")

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig  # noqa: E402
from cogview2.pipeline.config.sampling import (  # noqa: E402
    AutoregressiveSamplingConfig,
    DirectSRSamplingConfig,
    IterativeSRSamplingConfig,
)
from cogview2.pipeline.models.coglm.masks import CONTEXT, IMAGE, attention_mask  # noqa: E402
from cogview2.pipeline.models.coglm.model import CogLM  # noqa: E402
from cogview2.pipeline.models.sr.direct import DirectSR  # noqa: E402
from cogview2.pipeline.models.sr.iterative import IterativeSR  # noqa: E402
from cogview2.pipeline.sampling.autoregressive import sample_base_codes  # noqa: E402
from cogview2.pipeline.sampling.inference import let_visit  # noqa: E402
from cogview2.pipeline.sampling.meter import Meter, measured  # noqa: E402
from cogview2.pipeline.sampling.noise import batch_uniforms  # noqa: E402
from cogview2.pipeline.sampling.superres import direct_superres, iterative_superres  # noqa: E402
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
GRID, RATIO = 6, 2
VOCABULARY = Vocabulary.uniform(64, 100)
CONFIG = CogLMConfig(
    layers=2, hidden=128, heads=2, text_length=12, image_position=16, max_positions=128, dropout=0.0
)
TEXTS = [[70, 71, 72], [80], [90] * 11]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference of logits, as a share of the largest logit."""


def _drawn(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> tuple[CogLM, DirectSR, IterativeSR]:
    torch.manual_seed(0)
    coglm = CogLM(CONFIG, VOCABULARY.rows)
    direct = DirectSR(CONFIG, DirectSRConfig(text_length=8), GRID, RATIO, VOCABULARY.rows)
    iterative = IterativeSR(CONFIG, IterativeSRConfig(text_length=4), GRID * RATIO, VOCABULARY.rows)
    for model in (coglm, direct, iterative):
        _drawn(model)
    return coglm, direct, iterative


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_logits_equal_those_of_the_cpu(
    models: tuple[CogLM, DirectSR, IterativeSR], dtype: torch.dtype
) -> None:
    coglm = models[0]
    roles = torch.tensor([[CONTEXT] * 4 + [IMAGE] * 8])
    tokens, positions = torch.arange(12)[None] + 3, torch.arange(12)[None]
    with torch.no_grad():
        expected = coglm.logits(coglm(tokens, positions, attention_mask(roles)))
        moved = CogLM(CONFIG, VOCABULARY.rows).to(DEVICE, dtype).eval()
        moved.load_state_dict(coglm.state_dict())
        mask = attention_mask(roles.to(DEVICE))
        found = moved.logits(moved(tokens.to(DEVICE), positions.to(DEVICE), mask)).cpu()
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_seed_gives_the_same_codes_twice_and_on_the_cpu(
    models: tuple[CogLM, DirectSR, IterativeSR], dtype: torch.dtype
) -> None:
    labels = torch.arange(64) % 8
    cells = GRID**2 * RATIO**2
    noise = [
        batch_uniforms(5, range(3), "base", GRID**2, 2),
        batch_uniforms(5, range(3), "direct", cells, 2),
        batch_uniforms(5, range(3), "iterative", cells, 6).permute(2, 0, 1),
    ]

    def draw(device: str, dtype: torch.dtype) -> torch.Tensor:
        coglm, direct, iterative = (model.to(device, dtype) for model in models)
        base = sample_base_codes(
            coglm,
            TEXTS,
            noise[0],
            grid=GRID,
            vocabulary=VOCABULARY,
            labels=labels,
            config=AutoregressiveSamplingConfig(),
        )
        fine = direct_superres(
            direct,
            TEXTS,
            base,
            noise[1],
            vocabulary=VOCABULARY,
            labels=labels,
            config=DirectSRSamplingConfig(),
        )
        return iterative_superres(
            iterative, TEXTS, fine, noise[2], vocabulary=VOCABULARY, config=IterativeSRSamplingConfig()
        ).cpu()

    on_device, again = draw(DEVICE, dtype), draw(DEVICE, dtype)
    assert torch.equal(on_device, again)
    if dtype == torch.float32:
        assert (on_device == draw("cpu", torch.float32)).float().mean() > 0.97  # rounding may turn a draw
    for model in models:
        model.to("cpu", torch.float32)


def test_the_meter_reads_the_memory_of_the_device(models: tuple[CogLM, DirectSR, IterativeSR]) -> None:
    meter, coglm = Meter(), models[0].to(DEVICE)
    with measured(meter, "base", lambda: coglm, 3):
        torch.ones(1 << 20, device=DEVICE).sum().item()
    coglm.to("cpu")
    (cost,) = meter.costs
    assert cost.stage == "base" and cost.seconds > 0 and cost.peak_bytes >= 4 << 20


def test_a_model_that_takes_turns_draws_the_same_and_leaves_nothing(
    models: tuple[CogLM, DirectSR, IterativeSR],
) -> None:
    labels, noise = torch.arange(64) % 8, batch_uniforms(5, range(3), "base", GRID**2, 2)

    def draw(model: CogLM) -> torch.Tensor:
        config = AutoregressiveSamplingConfig()
        return sample_base_codes(
            model, TEXTS, noise, grid=GRID, vocabulary=VOCABULARY, labels=labels, config=config
        ).cpu()

    staying, visiting = CogLM(CONFIG, VOCABULARY.rows).eval(), CogLM(CONFIG, VOCABULARY.rows).eval()
    for model in (staying, visiting):
        model.load_state_dict(models[0].state_dict())
    expected = draw(staying.to(DEVICE))
    del staying
    torch.cuda.empty_cache()
    let_visit(visiting, torch.device(DEVICE))
    before = torch.cuda.memory_allocated()
    assert torch.equal(draw(visiting), expected)
    assert all(tensor.device.type == "cpu" for tensor in (*visiting.parameters(), *visiting.buffers()))
    weights = sum(p.numel() * p.element_size() for p in visiting.parameters())
    assert torch.cuda.memory_allocated() - before < weights / 2
