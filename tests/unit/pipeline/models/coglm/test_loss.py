"""The loss against the naive formula on all positions, with gradients and split."""

import pytest
import torch
import torch.nn.functional as F

from cogview2.pipeline.models.coglm.loss import LabelRanges, coglm_loss
from cogview2.pipeline.models.coglm.pipe import PipeLoss

RANGES = LabelRanges(image=(0, 10), english=(12, 20), chinese=(20, 30))


def _inputs(share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, words = torch.randn(3, 7, 8, requires_grad=True), torch.randn(35, 8, requires_grad=True)
    return hidden, words, torch.randint(0, 35, (3, 7)), torch.rand(3, 7) < share


def test_loss_and_gradients_equal_the_naive_formula() -> None:
    hidden, words, labels, mask = _inputs(0.4)
    parts = coglm_loss(hidden, words, labels, mask, RANGES)
    grads = torch.autograd.grad(parts.loss, (hidden, words))
    each = F.cross_entropy((hidden @ words.T).flatten(0, 1), labels.flatten(), reduction="none").view(3, 7)
    naive = (each * mask).sum() / mask.sum()
    torch.testing.assert_close(parts.loss, naive)
    for ours, expected in zip(grads, torch.autograd.grad(naive, (hidden, words)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_region_weights_give_the_mean_over_regions_of_their_means() -> None:
    hidden, words, labels, _ = _inputs(0.4)
    regions = torch.tensor([[1, 1, 0, 2, 2, 2, 0], [3, 0, 0, 0, 0, 0, 0], [0, 4, 4, 4, 4, 4, 4]])
    sizes = torch.bincount(regions.flatten())[regions]
    weights = torch.where(regions > 0, 1 / sizes, 0)
    parts = coglm_loss(hidden, words, labels, regions > 0, RANGES, weights)
    each = F.cross_entropy((hidden @ words.T).flatten(0, 1), labels.flatten(), reduction="none").view(3, 7)
    slow = torch.stack([each[regions == number].mean() for number in range(1, 5)]).mean()
    torch.testing.assert_close(parts.loss, slow)
    grads = torch.autograd.grad(parts.loss, (hidden, words))
    for ours, expected in zip(grads, torch.autograd.grad(slow, (hidden, words)), strict=True):
        torch.testing.assert_close(ours, expected)
    plain = coglm_loss(hidden, words, labels, regions > 0, RANGES)
    assert abs(float((plain.loss - slow).detach())) > 1e-3
    assert torch.equal(parts.sums, plain.sums) and torch.equal(parts.counts, plain.counts)


def test_equal_weights_change_no_bit() -> None:
    hidden, words, labels, mask = _inputs(0.4)
    ones = coglm_loss(hidden, words, labels, mask, RANGES, mask.float())
    assert torch.equal(ones.loss, coglm_loss(hidden, words, labels, mask, RANGES).loss)


def test_split_by_kind_of_label() -> None:
    hidden, words, labels, mask = _inputs(0.7)
    parts = coglm_loss(hidden, words, labels, mask, RANGES)
    each = F.cross_entropy((hidden @ words.T).flatten(0, 1), labels.flatten(), reduction="none").view(3, 7)
    for index, (_, (low, high)) in enumerate(RANGES.items()):
        kind = mask & (labels >= low) & (labels < high)
        assert parts.counts[index] == kind.sum()
        assert parts.sums[index].item() == pytest.approx(each[kind].sum().item(), rel=1e-5)
    assert not parts.sums.requires_grad


def test_no_loss_positions_give_zero_with_gradients() -> None:
    hidden, words, labels, mask = _inputs(0.0)
    parts = coglm_loss(hidden, words, labels, mask, RANGES, mask.float())
    assert float(coglm_loss(hidden, words, labels, mask, RANGES).loss.detach()) == 0
    parts.loss.backward()
    assert parts.loss == 0
    assert not hidden.grad.any() and not words.grad.any()


def test_pipe_loss_reports_the_same_keys_before_and_after() -> None:
    loss = PipeLoss(RANGES)
    before = list(loss.parts)
    hidden, words, labels, mask = _inputs(0.5)
    weights = torch.rand(3, 7)
    value = loss((hidden, words), (labels, mask, weights))
    parts = coglm_loss(hidden, words, labels, mask, RANGES, weights)
    assert torch.equal(value, parts.loss)
    assert list(loss.parts) == before
    assert loss.parts["english_loss_sum"] == parts.sums[1]
    assert loss.parts["chinese_labels"] == parts.counts[2]
