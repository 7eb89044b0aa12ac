"""The compiled kernels without autograd around them: which one serves a call, and calls with a chosen dropout seed."""

from typing import Literal

import torch
from attention_contract import Target
from dense_attention import Call

from cogview2.ops.local_attention import build, local_attention_2d
from cogview2.ops.local_attention.problem import Inputs, Library, Settings


def library(device: torch.device | str) -> Library:
    """Return the build that serves tensors of a device."""
    return Library(build.load("cuda" if torch.device(device).type == "cuda" else "cpu"))


def inputs(call: Call, seed: int | None = None) -> Inputs:
    """Put a call into the order of the C structure."""
    return Inputs(
        query=call.query,
        key=call.key,
        value=call.value,
        cross_key=call.cross_key,
        cross_value=call.cross_value,
        token_key=call.token_key,
        token_value=call.token_value,
        token_bias=call.token_bias,
        cross_bias=call.cross_bias,
        seed=None if seed is None else torch.tensor([seed], dtype=torch.int64, device=call.query.device),
    )


def settings(call: Call, dropout: float = 0.0) -> Settings:
    """Return the numbers of a call."""
    layout = call.layout
    assert layout.kernel_size is not None
    scale = call.query.shape[-1] ** -0.5
    return Settings(layout.kernel_size, layout.cross_kernel_size, layout.is_causal, scale, dropout)


def served_by(call: Call) -> tuple[str, str]:
    """Return the names of the kernels that serve the forward and the backward pass."""
    kernels = library(call.query.device)
    forward, backward = (
        kernels.kernel(inputs(call), settings(call), backward=value) for value in (False, True)
    )
    return forward, backward


def target_on(device: Literal["cpu", "cuda"]) -> Target:
    """Return the kernels of a device as what `attention_contract` tries."""

    def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        return local_attention_2d(**call.keywords(), return_lse=True, backend=device)

    return Target(device, run, served_by)
