"""The denominator of a loss that is a mean over the global batch (docs/decisions/0010-global-batch-loss.md)."""

from collections.abc import Iterable

import torch
import torch.distributed as dist


def weight_mass(loss_mask_BS: torch.Tensor, loss_weights_BS: torch.Tensor | None = None) -> torch.Tensor:
    """Return sum(w) over the loss positions of one micro batch, a float32 scalar; w is 1 by default.

    Summed in the order in which the loss sums it, so that one micro batch on one rank is divided by the very same number.
    """
    if loss_weights_BS is None:
        return loss_mask_BS.sum().float()
    return loss_weights_BS[loss_mask_BS].float().sum()


def mean_mass(masses: Iterable[torch.Tensor], group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the mean of sum(w) over all micro batches of a step on all ranks of `group`, a float32 scalar. Collective.

    A micro batch's loss sum(w CE), divided by it, has as mean over micro batches and ranks the sum(w CE) / sum(w) of
    the global batch: what engines average is then exact, however the batch is cut.

    Args:
        masses: `weight_mass` of this rank's micro batches; every rank has equally many, at least one.
        group: the data-parallel ranks; all ranks by default.
    """
    mine = torch.stack(list(masses)).double()
    total, micro_batches = mine.sum(), len(mine)
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
        micro_batches *= dist.get_world_size(group)
    return (total / micro_batches).float()
