"""2D local attention for models: checks, choice of the backend, and one call for all of them.

Dims: B batch, Y X query grid, H heads, D channels, T additional tokens.
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal, overload

import torch
from torch.autograd import forward_ad

from cogview2.ops.local_attention import build
from cogview2.ops.local_attention.checks import Call, check, check_cross_bias
from cogview2.ops.local_attention.flex import local_attention_2d_flex, missing_for_flex
from cogview2.ops.local_attention.problem import KernelError, wide_dtype
from cogview2.ops.local_attention.reference import local_attention_2d_reference
from cogview2.ops.local_attention.registration import autocast_dtype, library, local_attention_2d_op

Kernel = tuple[int, int]
Backend = Literal["reference", "cpu", "cuda", "flex"]
BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "cuda", "flex")
CUDA_CHANNELS = 256
"""Most channels of a head that the CUDA kernels serve."""


def available_backends() -> dict[Backend, str | None]:
    """Return for every backend None, or one sentence on what it lacks on this machine. Compiles nothing."""
    no_cuda = None if torch.cuda.is_available() else "no CUDA device is visible"
    return {
        "reference": None,
        "cpu": build.missing("cpu"),
        "cuda": no_cuda or build.missing("cuda"),
        "flex": no_cuda,
    }


@torch.compiler.assume_constant_result
def _lack(name: build.Name) -> str | None:
    """Load the kernels; say in one sentence why they cannot serve, or None. Asked once for each process."""
    return _loading_failure(name)


@cache
def _loading_failure(name: build.Name) -> str | None:
    try:
        library(name)
    except (build.BuildError, KernelError) as error:
        return str(error)
    return None


@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    """Warn, once for each message and process; also while code is traced."""
    _warn(message)


@cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def _choose(query: torch.Tensor, dropout_p: float) -> Backend:
    """Return the best backend that can serve; anything slower than the kernels is said once."""
    device = query.device.type
    if device == "meta":
        return "cpu"
    if device == "cpu":
        reason = _lack("cpu")
        if reason is None:
            return "cpu"
    elif device == "cuda":
        reason = _lack("cuda")
        if reason is None and query.shape[-1] > CUDA_CHANNELS:
            reason = f"the CUDA kernels serve heads of up to {CUDA_CHANNELS} channels, got {query.shape[-1]}"
        if reason is None:
            return "cuda"
        if missing_for_flex(query, dropout_p) is None:
            _warn_once(f"local attention falls back to FlexAttention, which is slower: {reason}")
            return "flex"
    else:
        reason = f"there are no kernels for {device} tensors"
    _warn_once(f"local attention falls back to its slow reference: {reason}")
    return "reference"


def _checked_backend(backend: str | None, query: torch.Tensor, dropout_p: float) -> Backend:
    if backend is None:
        return _choose(query, dropout_p)
    for known in BACKENDS:
        if backend == known:
            break
    else:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    device = query.device.type
    if known in ("cpu", "cuda") and device not in (known, "meta"):
        raise ValueError(
            f"backend {known!r} serves {known} tensors, got a query on {device}; move it or leave backend out"
        )
    if known in ("cpu", "cuda") and device != "meta":
        reason = _lack("cuda" if known == "cuda" else "cpu")
        if reason is not None:
            raise build.BuildError(reason)
    return known


@overload
def local_attention_2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Kernel,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    additional_keys: torch.Tensor | None = ...,
    additional_values: torch.Tensor | None = ...,
    additional_bias: torch.Tensor | None = ...,
    cross_key: torch.Tensor | None = ...,
    cross_value: torch.Tensor | None = ...,
    cross_kernel_size: Kernel | None = ...,
    cross_bias: float | torch.Tensor = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    backend: Backend | None = ...,
) -> torch.Tensor: ...


@overload
def local_attention_2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Kernel,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    additional_keys: torch.Tensor | None = ...,
    additional_values: torch.Tensor | None = ...,
    additional_bias: torch.Tensor | None = ...,
    cross_key: torch.Tensor | None = ...,
    cross_value: torch.Tensor | None = ...,
    cross_kernel_size: Kernel | None = ...,
    cross_bias: float | torch.Tensor = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    backend: Backend | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def local_attention_2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Kernel,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    additional_bias: torch.Tensor | None = None,
    cross_key: torch.Tensor | None = None,
    cross_value: torch.Tensor | None = None,
    cross_kernel_size: Kernel | None = None,
    cross_bias: float | torch.Tensor = 0.0,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend to the window, optionally also to a coarser grid's window and to tokens, in one softmax (spec 6).

    A window is centred on the query and clipped at the border of the grid. Channels should be contiguous; any
    other strides are read as they are, so views of a packed [B, Y, X, 3, H, D] projection cost no copy.

    Args:
        query: [B, Y, X, H, D], floating point.
        key, value: [B', Y, X, H, D], B a multiple of B'. Their grid may also be coarser, Y' and X' dividing Y and
            X: then the window is centred on the cell under the query, and there may be no other coarse grid.
        kernel_size: rows and columns of the window, in cells of the key grid.
        is_causal: the window ends at its centre, in raster order: full rows above, the own row up to the query.
        scale: factor of the scores before the biases; 1 / sqrt(D) by default.
        additional_keys, additional_values: tokens that every query sees, [B, T, H, D].
        additional_bias: added to their scores, [B, T]; -inf hides a token.
        cross_key, cross_value: a coarser grid, [B', Y', X', H, D], its window centred under the query.
        cross_kernel_size: rows and columns of that window, in coarse cells.
        cross_bias: added to the coarse scores: a number, or a tensor of one element.
        dropout_p: probability that a softmax weight is dropped (the others grow by 1 / (1 - p)); drawn from
            PyTorch's generator of the device.
        return_lse: also return the logarithm of the softmax's denominator, for `merge_attentions`.
        backend: "cpu", "cuda", "flex" or "reference"; by default the best that can serve, with one warning for
            each process where that is not a kernel of ours.

    Returns:
        [B, Y, X, H, D] in the dtype of `query`; with `return_lse` also [B, Y, X, H], float32 (float64 for
        float64). Under autocast both follow its dtype as those of a matrix product do.

    Raises:
        ValueError: arguments that do not fit together, or a backend that cannot serve them.
        build.BuildError: the kernels of the named backend cannot be built here.
    """
    dtype = autocast_dtype(query.device)
    if dtype is not None and query.dtype != torch.float64:
        cast = [
            None if tensor is None else tensor.to(dtype)
            for tensor in (query, key, value, cross_key, cross_value, additional_keys, additional_values)
        ]
        query, key, value = (tensor for tensor in cast[:3] if tensor is not None)
        cross_key, cross_value, additional_keys, additional_values = cast[3:]
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    check_cross_bias(cross_bias)
    call = check(
        query,
        (key, value),
        kernel_size,
        is_causal,
        (cross_key, cross_value),
        cross_kernel_size,
        (additional_keys, additional_values),
        additional_bias,
    )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    chosen = _checked_backend(backend, query, dropout_p)
    if chosen != "reference":
        _refuse_forward_mode(call, cross_bias)
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=query.device) if dropout_p else None
    if chosen in ("cpu", "cuda"):
        out, lse = _by_kernels(call, scale, cross_bias, dropout_p, seed)
    else:
        # These are made of many operators, none of which may round as autocast would.
        with nullcontext() if dtype is None else torch.autocast(query.device.type, enabled=False):
            out, lse = _by_torch(chosen, call, scale, cross_bias, dropout_p, seed)
    return (out, lse) if return_lse else out


def _refuse_forward_mode(call: Call, cross_bias: float | torch.Tensor) -> None:
    """A custom operator without a forward-mode rule would pretend that these derivatives are 0."""
    if torch.compiler.is_compiling():
        return
    tensors = (call.query, *call.local, *call.cross, *call.tokens, call.token_bias, cross_bias)
    if any(isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "only the backend 'reference' of local attention has forward-mode derivatives; name it"
        )


def _by_kernels(
    call: Call, scale: float, cross_bias: float | torch.Tensor, dropout_p: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    wide, device = wide_dtype(call.query.dtype), call.query.device
    bias: torch.Tensor | None = None
    if isinstance(cross_bias, torch.Tensor):
        bias = cross_bias.to(device, wide).reshape(())
    elif cross_bias != 0:
        # Filled in on the device; a copy would wait for it.
        bias = torch.full((), cross_bias, dtype=wide, device=device)
    return local_attention_2d_op(
        call.query,
        *call.local,
        *call.cross,
        *call.tokens,
        None if call.token_bias is None else call.token_bias.to(wide),
        None if call.cross[0] is None else bias,
        seed,
        call.kernel_size,
        call.cross_kernel_size,
        call.is_causal,
        scale,
        dropout_p,
    )


def _by_torch(
    backend: Backend,
    call: Call,
    scale: float,
    cross_bias: float | torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (call.query, *call.local, call.kernel_size)
    keywords: dict[str, Any] = {
        "is_causal": call.is_causal,
        "scale": scale,
        "additional_keys": call.tokens[0],
        "additional_values": call.tokens[1],
        "additional_bias": call.token_bias,
        "cross_key": call.cross[0],
        "cross_value": call.cross[1],
        "cross_kernel_size": call.cross_kernel_size,
        "cross_bias": cross_bias.reshape(()) if isinstance(cross_bias, torch.Tensor) else cross_bias,
        "dropout_p": dropout_p,
    }
    if backend == "flex":
        out, lse = local_attention_2d_flex(*arguments, **keywords, return_lse=True)
        return out, lse
    return local_attention_2d_reference(*arguments, **keywords, seed=seed)


def merge_attentions(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attentions of the same queries over disjoint keys into the attention over all of them.

    Args:
        outs: each [..., D].
        lses: the log-sum-exp of each, [...]; -inf where a part had no key.

    Returns:
        out [..., D] in the dtype of the first, lse [...]. Differentiable in both.

    Raises:
        ValueError: no parts, or not as many `outs` as `lses`.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge_attentions needs one lse for each out, got {len(outs)} and {len(lses)}")
    lse = torch.stack(list(lses)).logsumexp(0)
    total = torch.zeros((), dtype=lse.dtype, device=lse.device)
    for out, part in zip(outs, lses, strict=True):
        # A part without keys has weight 0, whatever it holds, and also where no part has any.
        weight = torch.exp(part - lse).masked_fill(part == -math.inf, 0.0)[..., None]
        total = total + torch.where(weight == 0, 0.0, weight * out.to(lse.dtype))
    return total.to(outs[0].dtype), lse
