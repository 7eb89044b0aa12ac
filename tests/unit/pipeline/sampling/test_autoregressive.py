"""Base codes: mixed prompts, caching, positions, and the number of model runs."""

import copy

import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.sampling import AutoregressiveSamplingConfig
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling.autoregressive import (
    UNKNOWN,
    Sequence,
    fill_unknown,
    lay_out_prompts,
    sample_base_codes,
)
from cogview2.pipeline.sampling.decoding import ClusterSampler
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
    sampler = ClusterSampler(
        LABELS,
        temperature=CONFIG.temperature,
        top_k_clusters=CONFIG.top_k_clusters,
        cluster_temperature=CONFIG.cluster_temperature,
    )
    for row, prompt in enumerate(PROMPTS):
        codes: list[int] = []
        for cell in range(GRID**2):
            logits = _published_sequence(model, prompt, codes, bias)[-1:]
            codes.append(int(sampler(logits, noise[row, cell : cell + 1])))
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
    assert prompts.tokens[:, 9:].eq(UNKNOWN).all()
    tokens = torch.cat([prompts.tokens[:, :9], codes], dim=1)
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


WIDE = CogLMConfig(layers=2, hidden=64, heads=4, max_positions=96, text_length=50, image_position=60)
"""Enough text slots that batches of short prompts leave some of them out."""


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_of_many_lengths_and_seeds(seed: int) -> None:
    """Also: a prompt of one token beside one that is cut; any batch size; any place in the batch."""
    torch.manual_seed(seed)
    model = CogLM(WIDE, VOCABULARY.rows)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    lengths = [1, 15, 16, 31, 49, 300, *torch.randint(1, 60, (3,)).tolist()]
    prompts = [torch.randint(41, 70, (length,)).tolist() for length in lengths]

    def sample(numbers: list[int]) -> torch.Tensor:
        return sample_base_codes(
            model,
            [prompts[number] for number in numbers],
            batch_uniforms(seed, numbers, "base", GRID**2, 2),
            grid=GRID,
            vocabulary=VOCABULARY,
            labels=LABELS,
            config=CONFIG,
        )

    together = sample(list(range(9)))
    for number in range(9):
        assert torch.equal(sample([number])[0], together[number]), lengths[number]
    assert torch.equal(sample([8, 3, 0]), together[[8, 3, 0]])


def test_logits_of_the_sampler_equal_the_published_sequence() -> None:
    """What the sampler draws from, cache, head and left-out slots included, to 1e-5; six layers deep."""
    torch.manual_seed(0)
    config = WIDE.model_copy(update={"layers": 6, "image_position": 12})
    model = CogLM(config, VOCABULARY.rows).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    prompts = [[50, 51, 52], [60], list(range(41, 61))]
    laid = lay_out_prompts(
        prompts,
        config=config,
        cells=30,
        vocabulary=VOCABULARY,
        text_attention_bias=1.4,
        device=torch.device("cpu"),
    )
    seen: list[torch.Tensor] = []

    def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return (uniforms[:, 0] * 40).long()

    filled = fill_unknown(model, laid, batch_uniforms(0, range(3), "x", 30, 2), draw=draw, ids=range(40))
    for row, prompt in enumerate(prompts):
        whole = _published_sequence(model, prompt, filled[row, -30:-1].tolist(), 1.4)[len(prompt) :]
        ours = torch.stack([logits[row] for logits in seen])
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=0)


def test_short_prompts_need_few_slots() -> None:
    def slots(prompts: list[list[int]]) -> int:
        laid = lay_out_prompts(
            prompts,
            config=WIDE,
            cells=4,
            vocabulary=VOCABULARY,
            text_attention_bias=1.0,
            device=torch.device("cpu"),
        )
        return laid.tokens.shape[1] - 4

    assert [slots([[41] * length]) for length in (0, 15, 16, 47, 48, 400)] == [16, 16, 32, 48, 50, 50]
    assert slots([[41], [41] * 20]) == 32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision(model: CogLM, dtype: torch.dtype, tolerance: float) -> None:
    """Logits of the published sequence stay near those of float32, the cache has the weights' type, codes are drawn."""
    small, half = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    for weight in small.parameters():  # moderate logits: the tolerance is then that of the type
        torch.nn.init.normal_(weight, std=0.05)
    half.load_state_dict(small.state_dict())
    half.to(dtype)
    codes = list(range(0, 24, 3))
    exact = _published_sequence(small, PROMPTS[0], codes, 1.4)
    rounded = _published_sequence(half, PROMPTS[0], codes, 1.4)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=tolerance * exact.std().item(), rtol=0.0)
    seen: list[torch.dtype] = []
    append = PreallocatedCache.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreallocatedCache, "append", lambda self, *a: _noted(append(self, *a), seen))
        drawn = _sample(half, PROMPTS, [0, 1, 2, 3, 4])
    assert set(seen) == {dtype}
    assert drawn.shape == (5, 25) and 0 <= drawn.min() and drawn.max() < 40


def _noted(
    parts: tuple[torch.Tensor, torch.Tensor], seen: list[torch.dtype]
) -> tuple[torch.Tensor, torch.Tensor]:
    seen.extend(part.dtype for part in parts)
    return parts


def test_known_tokens_between_unknown_ones(model: CogLM) -> None:
    """Against a run without cache for each token; the known ones travel with the next run."""
    tokens = torch.tensor([[50, 51, 70, 3, UNKNOWN, UNKNOWN, 7, 8, UNKNOWN, 9]] * 2)
    tokens[1, 6] = 1
    length = tokens.shape[1]
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 60, (2, length), generator=generator)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    mask[..., :2, :2] = True
    bias = torch.zeros(2, 1, 1, length)
    bias[..., :2] = 0.7
    noise = batch_uniforms(1, [0, 1], "fill", 3, 2)

    def first_above(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(logits.softmax(1).cumsum(1), uniforms[:, :1].contiguous())[:, 0].clamp_max(
            29
        )

    runs: list[int] = []
    hook = model.register_forward_hook(lambda _, inputs, __: runs.append(inputs[0].shape[1]))
    ours = fill_unknown(
        model, Sequence(tokens, positions, mask, bias), noise, draw=first_above, ids=range(5, 35)
    )
    hook.remove()
    assert runs == [4, 1, 3]
    model.eval()
    slow = tokens.clone()
    with torch.no_grad():
        for number, place in enumerate([4, 5, 8]):
            hidden = model(
                slow[:, :place],
                positions[:, :place],
                mask[..., :place, :place],
                attention_bias=bias[..., :place],
            )
            slow[:, place] = 5 + first_above(model.logits(hidden[:, -1])[:, 5:35], noise[:, number])
    model.train()
    assert torch.equal(ours, slow) and ours[:, 9].eq(9).all()


def test_an_early_end_leaves_the_rest_unknown(model: CogLM) -> None:
    tokens = torch.tensor([[50, 70, UNKNOWN, UNKNOWN, UNKNOWN]])
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    sequence = Sequence(tokens, torch.arange(5)[None], mask, torch.zeros(1, 1, 1, 1))
    seen: list[list[int]] = []

    def stop(drawn: torch.Tensor) -> bool:
        seen.append(drawn[0].tolist())
        return drawn.shape[1] == 2

    filled = fill_unknown(
        model,
        sequence,
        torch.zeros(1, 3, 2),
        draw=lambda logits, _: logits.argmax(1),
        ids=range(41, 60),
        stop=stop,
    )
    assert filled[0, 4] == UNKNOWN and filled[0, 2:4].tolist() == seen[-1] and len(seen) == 2
    assert 41 <= filled[0, 2:4].min() and filled[0, 2:4].max() < 60


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([[1, UNKNOWN, 2], [1, 2, UNKNOWN]], "at the same places"),
        ([[UNKNOWN, 1, 2], [UNKNOWN, 1, 2]], "first token"),
        ([[1, 2, UNKNOWN], [1, 2, UNKNOWN]], r"\[2, 1, 2\], got \[2, 2, 2\]"),
    ],
)
def test_sequences_that_cannot_be_filled(model: CogLM, tokens: list[list[int]], words: str) -> None:
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    sequence = Sequence(torch.tensor(tokens), torch.arange(3).expand(2, -1), mask, torch.zeros(1, 1, 1, 3))
    with pytest.raises(ValueError, match=words):
        fill_unknown(model, sequence, torch.zeros(2, 2, 2), draw=lambda logits, _: logits.argmax(1))
