"""Which kernel attends: PyTorch's scaled_dot_product_attention, or FlexAttention with a mask in blocks.

Dims: B batch, N heads, S tokens, K head dim.
"""

import functools
import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

logger = logging.getLogger(__name__)

Backend = Literal["sdpa", "flex"]
Mask = torch.Tensor | BlockMask
"""What attention takes: a bias that broadcasts to [B, N, S, T], or the visible pairs in blocks."""
BLOCK_SIZE = 128
_SMALLEST_HEAD = 16  # of the Triton kernels
_OLDEST_CAPABILITY = (8, 0)
# Every length, batch size and dtype is one compilation. Past the limit FlexAttention would put all scores in memory.
_COMPILATIONS = 64


def why_not_flex(
    device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, pb_relax: float = 0.0
) -> str | None:
    """Say in one sentence why FlexAttention cannot or should not serve, or None.

    Args:
        device, dtype: of queries, keys and values.
        head_dim: K.
        dropout: the probability that an attention weight is dropped, in the present mode.
        pb_relax: alpha of the published relaxed scores.
    """
    if device.type != "cuda":
        return f"FlexAttention trains on CUDA alone, and the tensors are on {device.type}"
    if dropout:
        return f"FlexAttention has no dropout, and the model's is {dropout}; dropout: 0 would let it serve"
    if pb_relax:
        return f"attention_pb_relax={pb_relax} computes its scores itself; 0 would let FlexAttention serve"
    if dtype == torch.float64:
        return "FlexAttention has no float64 kernel for CUDA; float32 or less would let it serve"
    if head_dim < _SMALLEST_HEAD:
        return f"FlexAttention needs heads of at least {_SMALLEST_HEAD} channels, and the model's have {head_dim}"
    if torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        return f"FlexAttention is for GPUs of compute capability 8.0 and later, and {device} is older"
    return None


@functools.cache
def _warn(reason: str) -> None:
    logger.warning("attention takes its mask as a dense bias: %s", reason)


def backend_for(
    device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, pb_relax: float = 0.0
) -> Backend:
    """Choose for a mask that is made of roles; see `why_not_flex` for the arguments.

    On CUDA, where the choice costs time, a "sdpa" is explained in the log, once per process and reason.
    """
    reason = why_not_flex(device, dtype, head_dim, dropout, pb_relax)
    if reason is None:
        return "flex"
    if device.type == "cuda":
        _warn(reason)
    return "sdpa"


def _attend(
    q_BNSK: torch.Tensor, k_BNSK: torch.Tensor, v_BNSK: torch.Tensor, mask: BlockMask
) -> torch.Tensor:
    # Named, because the kernel that is chosen for few queries has no backward pass.
    options: FlexKernelOptions = {"BACKEND": "TRITON"}
    out = flex_attention(q_BNSK, k_BNSK, v_BNSK, block_mask=mask, kernel_options=options)
    assert isinstance(out, torch.Tensor)
    return out


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(_attend, dynamic=False, fullgraph=True)


def flex_attend(
    q_BNSK: torch.Tensor, k_BNSK: torch.Tensor, v_BNSK: torch.Tensor, mask: BlockMask
) -> torch.Tensor:
    """Softmax attention of scale 1 / sqrt(K) over the visible pairs; [B, N, S, K].

    A query that sees nothing gets zeros, and gives no gradient. One fused kernel on CUDA; elsewhere all scores are in
    memory, which is for tests.
    """
    if not q_BNSK.is_cuda:
        return _attend(q_BNSK, k_BNSK, v_BNSK, mask)
    with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS, accumulated_recompile_limit=_COMPILATIONS):
        return _compiled()(q_BNSK, k_BNSK, v_BNSK, mask)
