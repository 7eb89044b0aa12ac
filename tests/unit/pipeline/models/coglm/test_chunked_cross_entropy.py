"""The loss in chunks against the plain formula: values, gradients, precision, and what it keeps in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cogview2.pipeline.models.coglm import chunked_cross_entropy
from cogview2.pipeline.models.coglm.chunked_cross_entropy import chunk_rows, weighted_cross_entropy

P, V, D = 23, 57, 12
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def naive(
    hidden: torch.Tensor, words: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The slow obvious formula: all logits, in the dtype of the inputs, softmax in at least float32."""
    logits = hidden @ words.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def make(dtype: torch.dtype = torch.float64, scale: float = 1.0, positions: int = P) -> Inputs:
    torch.manual_seed(0)
    hidden = (torch.randn(positions, D, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    words = torch.randn(V, D, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.rand(positions, dtype=torch.float64)
    weights[::5] = 0
    return hidden, words, torch.randint(0, V, (positions,)), weights


@pytest.mark.parametrize("rows", [1, 4, 22, 23, 1000])
def test_equals_the_plain_formula(rows: int) -> None:
    hidden, words, labels, weights = make()
    total, losses = weighted_cross_entropy(hidden, words, labels, weights, chunk_bytes=rows * V * 8)
    expected = naive(hidden, words, labels, weights)
    each = F.cross_entropy(hidden @ words.T, labels, reduction="none")
    torch.testing.assert_close(losses, each)
    assert not losses.requires_grad
    torch.testing.assert_close(total, expected)
    ours = torch.autograd.grad(-3 * total, (hidden, words))
    for mine, theirs in zip(ours, torch.autograd.grad(-3 * expected, (hidden, words)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    hidden, words, labels, weights = make(positions=5)
    found = torch.autograd.grad(
        weighted_cross_entropy(hidden, words, labels, weights, chunk_bytes=2 * V * 8)[0], (hidden, words)
    )
    step = 1e-6
    for tensor, gradient in zip((hidden, words), found, strict=True):
        flat = tensor.detach().view(-1)
        slopes = torch.empty_like(flat)
        for index in range(len(flat)):
            sides = []
            for sign in (1, -1):
                flat[index] += sign * step
                sides.append(weighted_cross_entropy(hidden, words, labels, weights)[0].detach())
                flat[index] -= sign * step
            slopes[index] = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(gradient.view(-1), slopes, rtol=1e-6, atol=1e-8)


def test_logits_far_apart_give_finite_losses() -> None:
    hidden, words, labels, weights = make(torch.float32, scale=3e4)
    total, losses = weighted_cross_entropy(hidden, words, labels, weights.float())
    assert float(losses.max()) > 1e4
    torch.testing.assert_close(total, naive(hidden, words, labels, weights.float()))
    for gradient in torch.autograd.grad(total, (hidden, words)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_is_near_the_exact_result(dtype: torch.dtype, tolerance: float) -> None:
    hidden, words, labels, weights = make(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, words)]
    expected = torch.autograd.grad(naive(*exact, labels, weights), exact)
    total, losses = weighted_cross_entropy(hidden, words, labels, weights, chunk_bytes=4 * V * 6)
    assert losses.dtype == total.dtype == torch.float32
    for mine, theirs in zip(torch.autograd.grad(total, (hidden, words)), expected, strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert float(error) < tolerance, float(error)


def test_float16_gradients_survive_small_weights_under_loss_scaling() -> None:
    """Unscaled, these gradients lie below the least float16 number; what arrives from above lifts them."""
    hidden, words, labels, weights = make(torch.float16)
    small = weights * 1e-9
    scale = 2.0**24
    total, _ = weighted_cross_entropy(hidden, words, labels, small, chunk_bytes=4 * V * 6)
    found = torch.autograd.grad(total * scale, (hidden, words))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, words)]
    expected = torch.autograd.grad(naive(*exact, labels, small) * scale, exact)
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine.double() - theirs).norm() / theirs.norm()) < 0.005
    assert not torch.autograd.grad(weighted_cross_entropy(hidden, words, labels, small)[0], hidden)[
        0
    ].any(), "the case is not small enough to show anything"


def test_float16_overflow_shows_as_infinity() -> None:
    """The loss scaler looks for it to lower its scale."""
    hidden, words, labels, weights = make(torch.float16)
    total, _ = weighted_cross_entropy(hidden, words, labels, weights)
    assert not torch.autograd.grad(total * 2.0**20, words)[0].isfinite().all()


def test_autocast_multiplies_in_its_dtype_and_returns_the_parameters_own() -> None:
    hidden, words, labels, weights = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = weighted_cross_entropy(hidden, words, labels, weights, chunk_bytes=4 * V * 6)
        plain = (F.cross_entropy(F.linear(hidden, words).float(), labels, reduction="none") * weights).sum()
    assert float(total.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    rounded = weighted_cross_entropy(hidden.bfloat16(), words.bfloat16(), labels, weights)[0]
    assert float(total.detach()) == pytest.approx(float(rounded.detach()), rel=1e-6)
    expected = torch.autograd.grad(naive(hidden, words, labels, weights), (hidden, words))
    for mine, theirs in zip(torch.autograd.grad(total, (hidden, words)), expected, strict=True):
        assert mine.dtype == torch.float32
        assert 0 < float((mine - theirs).norm() / theirs.norm()) < 0.02


def test_no_positions() -> None:
    hidden, words, labels, weights = make(positions=0)
    total, losses = weighted_cross_entropy(hidden, words, labels, weights)
    assert float(total.detach()) == 0 and losses.shape == (0,)
    gradients = torch.autograd.grad(total, (hidden, words))
    assert [tuple(gradient.shape) for gradient in gradients] == [(0, D), (V, D)]
    assert not gradients[1].any()


@pytest.mark.parametrize("frozen", ["hidden", "words"])
def test_a_frozen_input_gets_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, words, labels, weights = make()
    (hidden if frozen == "hidden" else words).requires_grad_(False)
    if frozen == "words":
        monkeypatch.setattr(chunked_cross_entropy, "_add_product", lambda *_, **__: pytest.fail("not needed"))
    weighted_cross_entropy(hidden, words, labels, weights)[0].backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (words.grad is None) == (frozen == "words")


class _Allocations(TorchDispatchMode):
    """Notes the size of every tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in (*args, *kwargs.values())
            if isinstance(tensor, torch.Tensor)
        }
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return result


def test_evaluation_makes_no_gradients() -> None:
    hidden, words, labels, weights = make()
    with torch.no_grad(), _Allocations() as seen:
        total, _ = weighted_cross_entropy(hidden, words, labels, weights, chunk_bytes=2 * V * 8)
    assert not total.requires_grad
    assert max(seen.sizes) <= 2 * V * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded(dtype: torch.dtype) -> None:
    positions, vocabulary, width, budget = 512, 1000, 8, 48_000
    hidden = torch.randn(positions, width, dtype=dtype, requires_grad=True)
    words = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    labels, weights = torch.randint(0, vocabulary, (positions,)), torch.ones(positions)
    with _Allocations() as seen:
        total, _ = weighted_cross_entropy(hidden, words, labels, weights, chunk_bytes=budget)
        (total * 2).backward()
    table = vocabulary * width * 4
    assert max(seen.sizes) <= max(budget, table), "more than a chunk of logits, or than the table's gradient"
    # One buffer of logits and one sum of the gradient in float32; everything else is smaller.
    assert sum(size >= table for size in seen.sizes) == 2


def test_used_twice_in_one_graph_the_gradients_add_up() -> None:
    hidden, words, labels, weights = make()
    first = weighted_cross_entropy(hidden, words, labels, weights)[0]
    second = weighted_cross_entropy(2 * hidden, words, labels.flip(0), weights)[0]
    expected = naive(hidden, words, labels, weights) + naive(2 * hidden, words, labels.flip(0), weights)
    ours = torch.autograd.grad(first + second, (hidden, words))
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (hidden, words)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_second_backward_pass_is_refused() -> None:
    hidden, words, labels, weights = make()
    total, _ = weighted_cross_entropy(hidden, words, labels, weights)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward pass; compute it again"):
        total.backward()


def test_inside_an_activation_checkpoint() -> None:
    hidden, words, labels, weights = make()

    def part(hidden: torch.Tensor) -> torch.Tensor:
        return weighted_cross_entropy(hidden.tanh(), words, labels, weights)[0]

    plain = torch.autograd.grad(part(hidden), (hidden, words))
    again = torch.autograd.grad(checkpoint(part, hidden, use_reentrant=False), (hidden, words))
    for mine, theirs in zip(again, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_a_label_out_of_range_is_refused() -> None:
    hidden, words, labels, weights = make()
    for wrong in (V, -1):
        labels[3] = wrong
        with pytest.raises(RuntimeError, match="out of bounds"):
            weighted_cross_entropy(hidden, words, labels, weights)


def test_chunks_keep_within_the_budget_and_are_of_one_size() -> None:
    assert chunk_rows(0, 100, 1000) == 1
    assert chunk_rows(5, 100, 10) == 1
    assert chunk_rows(10, 100, 10_000) == 10
    assert chunk_rows(11, 100, 1000) == 6  # not 10 and 1
    assert chunk_rows(1600, 150_010 * 4, 128 << 20) == 200
