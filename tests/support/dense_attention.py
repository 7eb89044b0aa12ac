"""Local attention as a dense softmax with a mask, on any device: what kernels are compared with.

Dims: B batch, Y X query grid, H heads, D channels, T tokens, Q queries, K keys in the order [tokens; coarse; local].
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from cogview2.ops.local_attention.flex import Layout, dense_mask

HIDDEN = -1e30


@dataclass(frozen=True)
class Call:
    """The tensors of one call; what a layout does not have is None.

    Attributes:
        layout: who sees whom.
        query, key, value: [B, Y, X, H, D].
        cross_key, cross_value: [B, Y', X', H, D].
        token_key, token_value: [B, T, H, D].
        token_bias: [B, T].
        cross_bias: one number.
    """

    layout: Layout
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cross_key: torch.Tensor | None = None
    cross_value: torch.Tensor | None = None
    token_key: torch.Tensor | None = None
    token_value: torch.Tensor | None = None
    token_bias: torch.Tensor | None = None
    cross_bias: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def leaves(self, dtype: torch.dtype | None = None) -> "Call":
        """Return new leaves of autograd with the same strides, or contiguous in another dtype.

        Biases stay at least as wide as they are.
        """

        def leaf(name: str, tensor: torch.Tensor) -> torch.Tensor:
            wanted = dtype or tensor.dtype
            if name.endswith("bias"):
                wanted = torch.promote_types(wanted, tensor.dtype)
            return tensor.detach().to(wanted).requires_grad_()

        return replace(self, **{name: leaf(name, tensor) for name, tensor in self.tensors().items()})

    def keywords(self) -> dict[str, Any]:
        """The arguments of `local_attention_2d`."""
        layout = self.layout
        assert layout.kernel_size is not None
        keywords: dict[str, Any] = {"query": self.query, "key": self.key, "value": self.value}
        keywords |= {"kernel_size": layout.kernel_size, "is_causal": layout.is_causal}
        if layout.tokens:
            keywords |= {"additional_keys": self.token_key, "additional_values": self.token_value}
            keywords |= {"additional_bias": self.token_bias}
        if layout.cross_keys:
            keywords |= {"cross_key": self.cross_key, "cross_value": self.cross_value}
            keywords |= {"cross_kernel_size": layout.cross_kernel_size}
            keywords |= {} if self.cross_bias is None else {"cross_bias": self.cross_bias}
        return keywords


def draw(
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    batch: int = 2,
    heads: int = 2,
    channels: int = 64,
    biases: bool = False,
    seed: int = 0,
) -> Call:
    """Draw a call from a normal distribution; query, key and value are views of one packed projection."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).to(of)

    query, key, value = normal(batch, *layout.grid, 3, heads, channels).unbind(3)
    call = Call(layout, query, key, value)
    wide = torch.promote_types(dtype, torch.float32)
    if layout.tokens:
        keys, values = normal(batch, layout.tokens, 2, heads, channels).unbind(2)
        call = replace(call, token_key=keys, token_value=values)
        if biases:
            call = replace(call, token_bias=normal(batch, layout.tokens, of=wide))
    if layout.cross_keys:
        keys, values = normal(batch, *layout.cross_grid, 2, heads, channels).unbind(3)
        call = replace(call, cross_key=keys, cross_value=values)
        if biases:
            call = replace(call, cross_bias=torch.tensor(0.7, dtype=wide, device=device))
    return call


def side_by_side(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return all keys and values, [B, K, H, D], and the bias of each key, [B, K]."""
    layout, batch = call.layout, call.query.shape[0]
    keys, values, biases = [], [], []
    wide = torch.promote_types(call.query.dtype, torch.float32)
    zeros = torch.zeros(batch, layout.keys, dtype=wide, device=call.query.device)
    if call.token_key is not None and call.token_value is not None:
        keys.append(call.token_key)
        values.append(call.token_value)
        bias = zeros[:, : layout.tokens]
        biases.append(bias if call.token_bias is None else bias + call.token_bias.clamp_min(HIDDEN))
    if call.cross_key is not None and call.cross_value is not None:
        keys.append(call.cross_key.flatten(1, 2))
        values.append(call.cross_value.flatten(1, 2))
        bias = zeros[:, : layout.cross_keys]
        biases.append(bias if call.cross_bias is None else bias + call.cross_bias)
    keys.append(call.key.flatten(1, 2))
    values.append(call.value.flatten(1, 2))
    biases.append(zeros[:, : layout.queries])
    return torch.cat(keys, dim=1), torch.cat(values, dim=1), torch.cat(biases, dim=1)


def dense(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, Y, X, H, D] and lse [B, Y, X, H], both in the dtype of the call."""
    keys, values, bias = side_by_side(call)
    scores = torch.einsum("bqhd,bkhd->bhqk", call.query.flatten(1, 2), keys) / math.sqrt(keys.shape[-1])
    scores = scores + bias[:, None, None]
    scores = scores.masked_fill(~dense_mask(call.layout, scores.device), -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    lse = scores.logsumexp(-1).transpose(1, 2)
    return out.unflatten(1, call.layout.grid), lse.unflatten(1, call.layout.grid)


def masked_sdpa(call: Call) -> torch.Tensor:
    """Return out [B, Y, X, H, D] of PyTorch's attention in the dtype of the call."""
    keys, values, bias = side_by_side(call)
    mask = bias[:, None, None].masked_fill(~dense_mask(call.layout, bias.device), -math.inf)
    query, key, value = (part.transpose(1, 2) for part in (call.query.flatten(1, 2), keys, values))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype))
    return out.transpose(1, 2).unflatten(1, call.layout.grid)


def gradients(
    call: Call,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor | None = None,
    grad_lse: Any = None,
) -> dict[str, torch.Tensor]:
    """Return the gradient of every tensor of a call of leaves, by name."""
    tensors = call.tensors()
    outputs, weights = [out], [grad_out.to(out.dtype)]
    if lse is not None:
        outputs.append(lse)
        weights.append(grad_lse.to(lse.dtype))
    found = torch.autograd.grad(outputs, list(tensors.values()), weights)
    return dict(zip(tensors, found, strict=True))
