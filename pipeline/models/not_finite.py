"""Makes one thing of two: a loss that is not finite always gives gradients that are not finite."""

import torch


def spoil_gradient(loss: torch.Tensor) -> None:
    """Let the gradient of `loss` become NaN on its way back when the loss itself is not finite.

    An infinite loss can have finite gradients (that of |x| is 1). The gradients are what all ranks and pipe stages add up
    before they update, so that like this every rank leaves the update out, or none. Nothing waits for the device, and a
    finite loss keeps its gradient bit by bit.

    Args:
        loss: scalar of one micro batch; without gradient nothing is done.
    """
    if loss.requires_grad:
        finite = loss.detach().isfinite()
        loss.register_hook(lambda gradient: torch.where(finite, gradient, torch.nan))
