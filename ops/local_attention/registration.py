"""The operator `cogview2::local_attention_2d` of the compiled kernels: CPU, CUDA, autograd, autocast, tracing.

Dims: B batch, Y X query grid, H heads, D channels, T additional tokens. `functional` is the way in: it checks the
arguments, draws the seed and chooses the backend.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from cogview2.ops.local_attention import build
from cogview2.ops.local_attention.problem import Inputs, Library, Settings, readable, wide_dtype

_NAME = "cogview2::local_attention_2d"
_WIDE_FIELDS = ("token_bias", "cross_bias", "seed")


@cache
def library(name: build.Name) -> Library:
    """Return the loaded kernels; builds them if need be (see `build.load`)."""
    return Library(build.load(name))


def _library_for(tensor: torch.Tensor) -> Library:
    return library("cuda" if tensor.is_cuda else "cpu")


def _settings(
    kernel_size: Sequence[int],
    cross_kernel_size: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout: float,
) -> Settings:
    rows, columns = kernel_size
    cross_rows, cross_columns = cross_kernel_size
    return Settings((rows, columns), (cross_rows, cross_columns), is_causal, scale, dropout)


@torch.library.custom_op(_NAME, mutates_args=(), device_types=("cpu", "cuda"))
def local_attention_2d_op(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cross_key: torch.Tensor | None,
    cross_value: torch.Tensor | None,
    token_key: torch.Tensor | None,
    token_value: torch.Tensor | None,
    token_bias: torch.Tensor | None,
    cross_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    kernel_size: Sequence[int],
    cross_kernel_size: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, Y, X, H, D] and lse [B, Y, X, H]; arguments as in `Inputs` and `Settings`."""
    inputs = _readable(
        Inputs(
            query, key, value, cross_key, cross_value, token_key, token_value, token_bias, cross_bias, seed
        )
    )
    settings = _settings(kernel_size, cross_kernel_size, is_causal, scale, dropout)
    return _library_for(query).forward(inputs, settings)


def _readable(inputs: Inputs) -> Inputs:
    return Inputs._make(
        None if tensor is None else tensor.contiguous() if name in _WIDE_FIELDS else readable(tensor)
        for name, tensor in zip(Inputs._fields, inputs, strict=True)
    )


@local_attention_2d_op.register_fake
def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, out.new_empty(out.shape[:-1], dtype=wide_dtype(out.dtype))


@torch.library.custom_op(f"{_NAME}_backward", mutates_args=(), device_types=("cpu", "cuda"))
def local_attention_2d_backward_op(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cross_key: torch.Tensor | None,
    cross_value: torch.Tensor | None,
    token_key: torch.Tensor | None,
    token_value: torch.Tensor | None,
    token_bias: torch.Tensor | None,
    cross_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    kernel_size: Sequence[int],
    cross_kernel_size: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    wanted: Sequence[bool],
) -> list[torch.Tensor]:
    """Return the wanted gradients, in the order of `Inputs`."""
    inputs = _readable(
        Inputs(
            query, key, value, cross_key, cross_value, token_key, token_value, token_bias, cross_bias, seed
        )
    )
    settings = _settings(kernel_size, cross_kernel_size, is_causal, scale, dropout)
    grads = _library_for(query).backward(
        inputs,
        settings,
        out.contiguous(),
        lse.contiguous(),
        readable(grad_out),
        None if grad_lse is None else grad_lse.contiguous(),
        wanted,
    )
    return [grad for grad in grads if grad is not None]


@local_attention_2d_backward_op.register_fake
def _(*arguments: Any) -> list[torch.Tensor]:
    inputs, wanted = arguments[: len(Inputs._fields)], arguments[-1]
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, want in zip(inputs, wanted, strict=True)
        if want
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    tensors = inputs[: len(Inputs._fields)]
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.settings = inputs[len(tensors) :]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None), *output)


def _backward(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    *saved, out, lse = ctx.saved_tensors
    remaining = iter(saved)
    tensors = [next(remaining) if present else None for present in ctx.present]
    wanted = [bool(need) for need in ctx.needs_input_grad[: len(tensors)]]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    found = iter(
        local_attention_2d_backward_op(*tensors, *ctx.settings, out, lse, grad_out, grad_lse, wanted)
    )
    grads = [next(found) if want else None for want in wanted]
    return (*grads, *(None for _ in ctx.settings))


local_attention_2d_op.register_autograd(_backward, setup_context=_setup_context)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast asks for on a device, or None outside of it."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _autocast(device: str) -> Any:
    """Run the operator in the dtype that autocast asks for. Biases keep theirs: -1e30 is no bfloat16 matter."""

    def kernel(_: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.get_autocast_dtype(device)
        cast = [
            tensor.to(dtype)
            if isinstance(tensor, torch.Tensor) and name not in _WIDE_FIELDS and tensor.dtype != torch.float64
            else tensor
            for name, tensor in zip(Inputs._fields, arguments, strict=False)
        ]
        with torch.autocast(device, enabled=False):
            return torch.ops.cogview2.local_attention_2d.default(*cast, *arguments[len(cast) :])

    return kernel


_FRAGMENT = torch.library.Library("cogview2", "FRAGMENT")
_FRAGMENT.impl("local_attention_2d", _autocast("cpu"), "AutocastCPU", with_keyset=True)
_FRAGMENT.impl("local_attention_2d", _autocast("cuda"), "AutocastCUDA", with_keyset=True)
