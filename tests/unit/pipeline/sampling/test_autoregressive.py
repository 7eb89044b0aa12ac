"""Base codes: mixed prompts, caching, positions, and the number of model runs."""

import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.sampling import AutoregressiveSamplingConfig
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling.autoregressive import lay_out_prompts, sample_base_codes
from cogview2.pipeline.sampling.decoding import draw_cluster
from cogview2.pipeline.sampling.kv_cache import PreallocatedCache
from cogview2.pipeline.sampling.noise import batch_uniforms
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

TINY = CogLMConfig(layers=2, hidden=64, heads=4, max_positions=64, text_length=9, image_position=12)
VOCABULARY = Vocabulary.uniform(40, 30)
GRID = 5
CONFIG = AutoregressiveSamplingConfig(top_k_clusters=6)
LABELS = torch.arange(40) % 11
PROMPTS = [[50, 51, 52], [60], [], [41 + i for i in range(8)], [55, 44, 45, 46, 47, 48]]


@pytest.fixture(scope="module")
def model() -> CogLM:
    torch.manual_seed(0)
    model = CogLM(TINY, VOCABULARY.rows)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _sample(model: CogLM, prompts: list[list[int]], numbers: list[int], **changes: float) -> torch.Tensor:
    return sample_base_codes(
        model,
        prompts,
        batch_uniforms(5, numbers, "base", GRID**2, 2),
        grid=GRID,
        vocabulary=VOCABULARY,
        labels=LABELS,
        config=CONFIG.model_copy(update=changes),
    )


def _published_sequence(
    model: CogLM, text: list[int], codes: list[int], bias: float, **extra: object
) -> torch.Tensor:
    """Return the logits [S, codes] of `text SOI codes` as spec 3.2 states it: one prompt, no unused slots."""
    tokens = torch.tensor([[*text, VOCABULARY.start_of_image, *codes]])
    t, length = len(text), tokens.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:, :t] = True
    weights = torch.zeros(length, length)
    weights[:, :t] = bias
    positions = torch.tensor([[*range(t), *(12 + i for i in range(len(codes) + 1))]])
    with torch.no_grad():
        hidden = model(tokens, positions, mask[None, None], attention_bias=weights)
    return model.logits(hidden, 40)[0]


def test_mixed_lengths_equal_batches_of_one(model: CogLM) -> None:
    together = _sample(model, PROMPTS, [0, 1, 2, 3, 4])
    assert together.shape == (5, 25) and together.min() >= 0 and together.max() < 40
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(_sample(model, [prompt], [row])[0], together[row])
    assert not torch.equal(together[0], _sample(model, PROMPTS[:1], [1])[0])
    assert model.training  # the mode of before


@pytest.mark.parametrize("bias", [0.0, 1.4])
def test_codes_equal_uncached_sampling_of_the_published_sequence(model: CogLM, bias: float) -> None:
    model.eval()
    noise = batch_uniforms(5, range(5), "base", GRID**2, 2)
    ours = _sample(model, PROMPTS, [0, 1, 2, 3, 4], text_attention_bias=bias)
    for row, prompt in enumerate(PROMPTS):
        codes: list[int] = []
        for cell in range(GRID**2):
            logits = _published_sequence(model, prompt, codes, bias)[-1:]
            codes.append(
                int(
                    draw_cluster(
                        logits,
                        LABELS,
                        noise[row, cell : cell + 1],
                        temperature=CONFIG.temperature,
                        top_k_clusters=CONFIG.top_k_clusters,
                        cluster_temperature=CONFIG.cluster_temperature,
                    )
                )
            )
        assert codes == ours[row].tolist()
    model.train()


def test_cached_logits_equal_uncached(model: CogLM) -> None:
    model.eval()
    codes = _sample(model, PROMPTS, [0, 1, 2, 3, 4])
    prompts = lay_out_prompts(
        PROMPTS,
        config=TINY,
        cells=GRID**2,
        vocabulary=VOCABULARY,
        text_attention_bias=1.4,
        device=torch.device("cpu"),
    )
    tokens = torch.cat([prompts.tokens, codes], dim=1)
    cache = PreallocatedCache(2, tokens.shape[1])
    parts = []
    with torch.no_grad():
        for start, stop in [(0, 9), *((i, i + 1) for i in range(9, tokens.shape[1]))]:
            hidden = model(
                tokens[:, start:stop],
                prompts.position_ids[:, start:stop],
                prompts.attention_mask[:, :, start:stop, :stop],
                attention_bias=prompts.attention_bias[..., :stop],
                cache=cache,
            )
            parts.append(model.logits(hidden, 40))
    cached = torch.cat(parts, dim=1)
    for row, prompt in enumerate(PROMPTS):
        whole = _published_sequence(model, prompt, codes[row].tolist(), 1.4)
        torch.testing.assert_close(cached[row, : len(prompt)], whole[: len(prompt)], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cached[row, 8:], whole[len(prompt) :], atol=1e-5, rtol=1e-5)
    model.train()


def test_one_model_run_for_each_code(model: CogLM) -> None:
    lengths: list[int] = []
    hook = model.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    _sample(model, PROMPTS[:2], [0, 1])
    hook.remove()
    assert lengths == [9] + [1] * (GRID**2 - 1)


def test_long_prompts_are_cut(model: CogLM) -> None:
    long = [41 + i for i in range(20)]
    assert torch.equal(_sample(model, [long], [0]), _sample(model, [long[:8]], [0]))
    assert not torch.equal(_sample(model, [long[:8]], [0]), _sample(model, [long[:7]], [0]))


def test_wrong_uniforms_are_refused(model: CogLM) -> None:
    with pytest.raises(ValueError, match=r"\[1, 25, 2\], got \[2, 25, 2\]"):
        _sample(model, PROMPTS[:1], [0, 1])


def test_a_full_cache_is_refused() -> None:
    cache = PreallocatedCache(2, 3)
    keys = torch.zeros(1, 1, 2, 4)
    cache.append(0, keys, keys)
    with pytest.raises(ValueError, match="holds 3 tokens, not 4"):
        cache.append(0, keys, keys)
    assert cache.append(1, keys, keys)[0].shape == (1, 1, 2, 4)
