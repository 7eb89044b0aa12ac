"""Cross-entropy over a large vocabulary without the logits of all positions (spec 2.6).

Dims: P loss positions, R positions of one chunk, V vocabulary, D hidden.

A chunk of positions makes its logits, its losses and, when gradients are wanted, its share of both gradients at once;
then the next chunk writes over its logits. Three matrix products per chunk, as many as the plain formula needs: the
backward pass only multiplies the finished gradients by what arrives from above. So the weights of the positions must
be known in the forward pass, and the words are not needed in the backward one (ZeRO-3 has put them away by then).
"""

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 768 << 20}
"""What the logits of a chunk may take. Fewer make products too small for the device; more only take memory."""
_BLOCK_ROWS = 8192


def chunk_rows(positions: int, bytes_per_position: int, budget: int) -> int:
    """Return how many positions a chunk holds, at least 1: chunks of equal size that keep within `budget` bytes."""
    most = max(budget // max(bytes_per_position, 1), 1)
    chunks = max(-(-positions // most), 1)
    return max(-(-positions // chunks), 1)


@functools.cache
def _has_mixed_products(device: torch.device) -> bool:
    """Whether this device multiplies half precision into float32 (CUDA, from torch 2.8; not the CPU)."""
    if device.type != "cuda":
        return False
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
        torch.mm(ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _product(
    left_RD: torch.Tensor, words_VD: torch.Tensor, wide_RV: torch.Tensor, work_RV: torch.Tensor
) -> None:
    """Write left @ words.T to `wide_RV`; `work_RV` is `wide_RV` itself, or scratch in the dtype of the factors."""
    if work_RV is wide_RV:
        torch.mm(left_RD, words_VD.T, out=wide_RV)
    elif _has_mixed_products(left_RD.device):
        torch.mm(left_RD, words_VD.T, out_dtype=wide_RV.dtype, out=wide_RV)
    else:
        wide_RV.copy_(torch.mm(left_RD, words_VD.T, out=work_RV))


def _add_product(total_VD: torch.Tensor, left_RV: torch.Tensor, right_RD: torch.Tensor, first: bool) -> None:
    """Add left.T @ right to `total_VD`, or write it there when `first`."""
    beta = 0 if first else 1
    if total_VD.dtype == left_RV.dtype:
        torch.addmm(total_VD, left_RV.T, right_RD, beta=beta, out=total_VD)
    elif _has_mixed_products(left_RV.device):
        torch.addmm(total_VD, left_RV.T, right_RD, out_dtype=total_VD.dtype, beta=beta, out=total_VD)
    else:
        # Rounded once per chunk to the factors' dtype, but summed over chunks in float32.
        for low in range(0, len(total_VD), _BLOCK_ROWS):
            block = total_VD[low : low + _BLOCK_ROWS]
            part = left_RV[:, low : low + _BLOCK_ROWS].T @ right_RD
            block.copy_(part) if first else block.add_(part)


def _softmax_losses(wide_RV: torch.Tensor, labels_R1: torch.Tensor) -> torch.Tensor:
    """Turn logits into probabilities in place, and return the cross-entropies [R]."""
    top_R1, where_R1 = wide_RV.max(1, keepdim=True)
    below_R1 = top_R1 - wide_RV.gather(1, labels_R1)
    torch.softmax(wide_RV, 1, out=wide_RV)
    # The likeliest word has at least 1 / V: unlike the label's own probability, its logarithm is never infinite.
    return (below_R1 - wide_RV.gather(1, where_R1).log())[:, 0]


class _WeightedCrossEntropy(torch.autograd.Function):
    """(hidden [P, D], words [V, D], labels [P], weights [P], ...) -> (sum of w CE, CE [P] without gradient)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: torch.Tensor,
        words_VD: torch.Tensor,
        labels_P: torch.Tensor,
        weights_P: torch.Tensor,
        dtype: torch.dtype,
        budget: int,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for_hidden, for_words = (with_gradients and wanted for wanted in ctx.needs_input_grad[:2])
        wide = torch.promote_types(dtype, torch.float32)
        positions, width, vocabulary = *hidden_PD.shape, len(words_VD)
        device = hidden_PD.device
        words = words_VD.detach().to(dtype)
        weights_P = weights_P.detach().to(wide)
        # Relative weights are at most 1, so that half precision holds the products; the rest is put on at the end.
        largest = (
            weights_P.abs().max().clamp(min=torch.finfo(wide).tiny) if positions else weights_P.new_ones(())
        )
        relative_P1 = (weights_P / largest)[:, None]
        d_hidden_PD = hidden_PD.new_empty(positions, width, dtype=dtype) if for_hidden else None
        d_words_VD = words.new_empty(vocabulary, width, dtype=wide) if for_words else None
        if d_words_VD is not None and not positions:
            d_words_VD.zero_()
        per_position = vocabulary * (wide.itemsize + (dtype.itemsize if dtype != wide else 0))
        rows = chunk_rows(positions, per_position, budget)
        wide_buffer = torch.empty(min(rows, positions), vocabulary, dtype=wide, device=device)
        work_buffer = wide_buffer if dtype == wide else torch.empty_like(wide_buffer, dtype=dtype)
        losses_P = torch.empty(positions, dtype=wide, device=device)
        for low in range(0, positions, rows):
            chunk = slice(low, min(low + rows, positions))
            count = chunk.stop - low
            # The same object where there is only one buffer: that is how the products know.
            wide_RV = wide_buffer[:count]
            work_RV = wide_RV if work_buffer is wide_buffer else work_buffer[:count]
            hidden_RD, labels_R1 = hidden_PD[chunk].detach().to(dtype), labels_P[chunk, None]
            _product(hidden_RD, words, wide_RV, work_RV)
            losses_P[chunk] = _softmax_losses(wide_RV, labels_R1)
            if not (for_hidden or for_words):
                continue
            wide_RV.scatter_(1, labels_R1, wide_RV.gather(1, labels_R1) - 1)
            if work_RV is not wide_RV:
                work_RV.copy_(wide_RV)
            if d_hidden_PD is not None:
                torch.mm(work_RV, words, out=d_hidden_PD[chunk])
            if d_words_VD is not None:
                scaled_RD = (hidden_RD * relative_P1[chunk]).to(dtype)
                _add_product(d_words_VD, work_RV, scaled_RD, first=low == 0)
        ctx.gradients = d_hidden_PD, d_words_VD
        ctx.dtypes = hidden_PD.dtype, words_VD.dtype
        ctx.save_for_backward(weights_P, largest)
        ctx.mark_non_differentiable(losses_P)
        return (weights_P * losses_P).sum(), losses_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the chunked cross-entropy gives its gradients away in its first backward pass; compute it again for a second"
            )
        d_hidden_PD, d_words_VD = ctx.gradients
        ctx.gradients = None  # what is returned may become somebody's .grad without a copy
        weights_P, largest = ctx.saved_tensors
        hidden_dtype, words_dtype = ctx.dtypes
        if d_hidden_PD is not None:
            d_hidden_PD = (d_hidden_PD * (weights_P * grad)[:, None]).to(hidden_dtype)
        if d_words_VD is not None:
            d_words_VD = d_words_VD.mul_(largest * grad).to(words_dtype)
        return d_hidden_PD, d_words_VD, None, None, None, None, None


def working_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer would multiply `hidden` here: autocast's where it is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def weighted_cross_entropy(
    hidden_PD: torch.Tensor,
    words_VD: torch.Tensor,
    labels_P: torch.Tensor,
    weights_P: torch.Tensor,
    *,
    chunk_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum(w CE), a scalar with gradients to hidden and words, and the CE [P] in nats, without gradient.

    Products are made in the working dtype (autocast's, or that of `hidden_PD`), softmax, losses and the sum of
    the words' gradient in float32 at least. One backward pass per call; no second derivatives. Weights and
    labels get no gradient.

    Args:
        hidden_PD: hidden states of the loss positions; P may be 0.
        words_VD: the output matrix; the softmax runs over its rows.
        labels_P: int64 in [0, V).
        weights_P: w, any float dtype.
        chunk_bytes: bound of the logits in memory at one time, at least one position; `CHUNK_BYTES` by default.

    Raises:
        RuntimeError: a label is out of range (CPU), or the result's backward pass is run twice.
    """
    dtype = working_dtype(hidden_PD)
    kind = hidden_PD.device.type
    budget = CHUNK_BYTES.get(kind, CHUNK_BYTES["cuda"]) if chunk_bytes is None else chunk_bytes
    with torch.autocast(kind, enabled=False):
        total, losses_P = _WeightedCrossEntropy.apply(
            hidden_PD, words_VD, labels_P, weights_P, dtype, budget, torch.is_grad_enabled()
        )
    return total, losses_P
