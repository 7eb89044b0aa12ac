"""One mask per micro batch, in two forms that do the same."""

import functools

import pytest
import torch
from torch.nn.attention import flex_attention

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.coglm import pipe, visibility
from cogview2.pipeline.models.coglm.masks import CONTEXT, HIDDEN, IMAGE, attention_mask, segment_role
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.coglm.visibility import Visibility, visibility_of
from cogview2.pipeline.models.transformer.attention import attend, score_bias

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
KINDS = torch.tensor([HIDDEN, CONTEXT, IMAGE, segment_role(2, reads_image=True), segment_role(3)])
CONFIG = CogLMConfig(layers=2, hidden=32, heads=2, dropout=0.0, max_positions=200)


@pytest.fixture
def flex_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses gradients of FlexAttention on a CPU, but its plain implementation computes them."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The roles from which a bias was made, one entry each time."""
    seen: list[torch.Tensor] = []

    def noted(roles: torch.Tensor) -> torch.Tensor:
        seen.append(roles)
        return attention_mask(roles)

    monkeypatch.setattr(visibility, "attention_mask", noted)
    monkeypatch.setattr(visibility, "_latest", None)
    return seen


def random_roles(length: int, *, blind: bool) -> torch.Tensor:
    """Two samples; with `blind` the second has no context, and some of its tokens see nothing."""
    torch.manual_seed(1)
    roles = KINDS[torch.randint(0, len(KINDS), (2, length))]
    roles[:, 0] = CONTEXT
    roles[:, -1] = HIDDEN
    if blind:
        roles[1] = torch.tensor([HIDDEN, segment_role(3)])[torch.randint(0, 2, (length,))]
    return roles


@pytest.mark.parametrize("length", [5, 128, 150])
@pytest.mark.parametrize("blind", [False, True])
def test_both_backends_attend_alike(length: int, blind: bool, flex_with_gradients: None) -> None:
    roles = random_roles(length, blind=blind)
    visible = attention_mask(roles)
    q, k, v = (torch.randn(2, 2, length, 16, requires_grad=True) for _ in range(3))
    sees = visible.any(-1, keepdim=True)
    assert bool(sees.all()) != blind
    expected = attend(q, k, v, score_bias(visible, torch.float32), 0.0)
    found = attend(q, k, v, Visibility(roles).block_mask(), 0.0)
    torch.testing.assert_close(found * sees, expected * sees)
    assert not (found * ~sees).any()
    upward = torch.randn_like(found)
    # What a blind token gives is nobody's: no loss is there and no one sees it.
    theirs = torch.autograd.grad(expected, (q, k, v), upward * sees)
    for mine, other in zip(torch.autograd.grad(found, (q, k, v), upward * sees), theirs, strict=True):
        torch.testing.assert_close(mine, other)
    hidden = ~visible.any(-2).squeeze(1)
    assert (roles[hidden] == HIDDEN).all() and hidden.any()
    for gradient in theirs[1:]:
        assert not gradient.transpose(1, 2)[hidden].any()


def test_blind_tokens_bring_no_nan_into_any_gradient(flex_with_gradients: None) -> None:
    roles = random_roles(20, blind=True)
    for backend in ("sdpa", "flex"):
        torch.manual_seed(0)
        model = CogLM(CONFIG, 50)
        hidden = model(
            torch.randint(0, 50, (2, 20)), torch.arange(20).expand(2, -1), Visibility(roles, backend)
        )
        hidden.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), (backend, name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_the_same_with_either_backend(checkpointing: bool, flex_with_gradients: None) -> None:
    roles = random_roles(30, blind=False)
    tokens, positions = torch.randint(0, 50, (2, 30)), torch.arange(30).expand(2, -1)
    torch.manual_seed(0)
    model = CogLM(CONFIG, 50)
    model.transformer.activation_checkpointing = checkpointing
    results = []
    for mask in (attention_mask(roles), Visibility(roles, "sdpa"), Visibility(roles, "flex")):
        model.zero_grad()
        hidden = model(tokens, positions, mask)
        model.logits(hidden).logsumexp(-1).sum().backward()
        results.append([hidden.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for plain, sdpa, flex in zip(*results, strict=True):
        assert torch.equal(plain, sdpa)
        torch.testing.assert_close(flex, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plain_model_makes_one_mask(checkpointing: bool, builds: list[torch.Tensor]) -> None:
    model = CogLM(CONFIG, 50)
    model.transformer.activation_checkpointing = checkpointing
    roles = random_roles(9, blind=False)
    model(
        torch.zeros(2, 9, dtype=torch.int64), torch.arange(9).expand(2, -1), Visibility(roles)
    ).sum().backward()
    assert len(builds) == 1


def test_the_blocks_of_a_pipe_stage_share_one_mask(builds: list[torch.Tensor]) -> None:
    blocks = [pipe.PipeBlock(CONFIG, seed) for seed in range(3)]
    hidden = torch.randn(2, 9, 32)
    for micro_batch in range(2):
        roles = random_roles(9, blind=bool(micro_batch))
        flow: tuple[torch.Tensor, torch.Tensor] = hidden, roles
        for block in blocks:
            flow = block(flow)
        # Activation checkpoints run a block again on detached inputs.
        again = blocks[2]((hidden, roles.detach()))
        assert again[0].shape == hidden.shape
        assert len(builds) == micro_batch + 1
        expected = hidden
        bias = score_bias(attention_mask(roles), torch.float32)
        for block in blocks:
            attention = functools.partial(block.attention, bias=bias)
            expected = super(pipe.PipeBlock, block).forward(expected, attention)
        assert torch.equal(flow[0], expected)


def test_other_roles_are_never_taken_for_the_last_ones() -> None:
    roles = random_roles(9, blind=False)
    first = visibility_of(roles)
    assert visibility_of(roles) is first and visibility_of(roles.detach()) is first
    assert visibility_of(roles.clone()) is not first
    first = visibility_of(roles)
    assert visibility_of(roles[:1]) is not first
    first = visibility_of(roles)
    assert visibility_of(roles.T.contiguous().T) is not first
    first = visibility_of(roles)
    roles[0, 1] = HIDDEN  # the same memory, other numbers
    changed = visibility_of(roles)
    assert changed is not first
    assert torch.equal(changed.bias(torch.float32), score_bias(attention_mask(roles), torch.float32))
    with torch.inference_mode():
        uncounted = roles.clone()
        assert visibility_of(uncounted) is not visibility_of(uncounted)


def test_freed_memory_is_not_mistaken() -> None:
    """The allocator likes to hand out the same address again; the last roles are kept alive for that."""
    for seed in range(50):
        torch.manual_seed(seed)
        roles = KINDS[torch.randint(0, len(KINDS), (1, 6))]
        expected = score_bias(attention_mask(roles), torch.float32)
        assert torch.equal(visibility_of(roles).bias(torch.float32), expected)
        del roles


def test_a_bias_for_each_dtype() -> None:
    made = Visibility(random_roles(6, blind=False))
    single, half = made.bias(torch.float32), made.bias(torch.bfloat16)
    assert (single.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert made.bias(torch.float32) is single and single.shape == (2, 1, 6, 6)
