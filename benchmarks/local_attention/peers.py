"""Other ways to do the same work, each called as its own documentation says, and ours.

A peer takes a case and its inputs, prepares what does not depend on their values (masks, compiled kernels), and
returns a call without arguments whose result is [B, Y, X, H, D].
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from cases import Case, Inputs
from published import published
from scores_in_memory import slices, unfold
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cogview2.ops.local_attention.flex import dense_mask, local_attention_2d_flex

if TYPE_CHECKING:
    from cogview2.ops.local_attention.functional import Backend
    from cogview2.ops.local_attention.problem import Inputs as ProblemInputs
    from cogview2.ops.local_attention.problem import Library, Settings

Call = Callable[[], torch.Tensor]
TILE = 8  # rows and columns of a tile of the reordered FlexAttention
# Mask blocks of 64 need this on Hopper: the sizes that PyTorch takes there untried only divide blocks of 128.
AUTOTUNED = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class Peer:
    """One competitor.

    Attributes:
        name: of its rows.
        prepare: see the module.
        exact: its result is local attention; the dense ones see every key, and NATTEN moves windows at borders.
        backward: it can be trained.
    """

    name: str
    prepare: Callable[[Case, Inputs], Call]
    exact: bool = True
    backward: bool = True


class NotForThisCaseError(ValueError):
    """A peer cannot express a case."""


def _heads_first(*parts: torch.Tensor | None) -> torch.Tensor:
    """[B, ..., H, D] each -> [B, H, keys, D]."""
    flat = [part.flatten(1, -3) for part in parts if part is not None]
    return (flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).transpose(1, 2)


def _query(inputs: Inputs) -> torch.Tensor:
    return _heads_first(inputs.query)


def _keys(inputs: Inputs) -> torch.Tensor:
    return _heads_first(inputs.additional_keys, inputs.cross_key, inputs.key)


def _values(inputs: Inputs) -> torch.Tensor:
    return _heads_first(inputs.additional_values, inputs.cross_value, inputs.value)


def _on_grid(out_BHQD: torch.Tensor, case: Case) -> torch.Tensor:
    return out_BHQD.transpose(1, 2).unflatten(1, case.layout.grid)


# ---- ours


def ours(backend: "Backend | None") -> Callable[[Case, Inputs], Call]:
    """The operator, by the name of a backend."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        from cogview2.ops.local_attention import local_attention_2d

        keywords = inputs.keywords(case)
        return lambda: local_attention_2d(**keywords, backend=backend)

    return prepare


def _problem(case: Case, inputs: Inputs) -> "tuple[Library, ProblemInputs, Settings]":
    """Return the kernels of a device and a case in their words, without the operator around them."""
    from cogview2.ops.local_attention import build, problem

    library = problem.Library(build.load("cuda" if inputs.query.is_cuda else "cpu"))
    tensors = problem.Inputs(
        query=inputs.query,
        key=inputs.key,
        value=inputs.value,
        cross_key=inputs.cross_key,
        cross_value=inputs.cross_value,
        token_key=inputs.additional_keys,
        token_value=inputs.additional_values,
        token_bias=None,
        cross_bias=None,
        seed=None,
    )
    layout = case.layout
    settings = problem.Settings(
        kernel_size=case.window,
        cross_kernel_size=layout.cross_kernel_size,
        is_causal=layout.is_causal,
        scale=case.channels**-0.5,
        dropout=0.0,
    )
    return library, tensors, settings


def ours_plain(case: Case, inputs: Inputs) -> Call:
    """The forward kernel for tensors that tensor cores cannot load from; the operator would copy such tensors first."""
    library, tensors, settings = _problem(case, inputs.misaligned())
    served = library.kernel(tensors, settings)
    if inputs.query.is_cuda and served != "plain":
        raise NotForThisCaseError(f"served by {served}")
    return lambda: library.forward(tensors, settings)[0]


def kernel_names(case: Case, inputs: Inputs) -> str:
    """Say which kernels serve a case, forward and backward."""
    library, tensors, settings = _problem(case, inputs)
    names = [library.kernel(tensors, settings, backward=backward) for backward in (False, True)]
    return " and ".join(names)


def separate_and_merged(backend: "Backend | None") -> Callable[[Case, Inputs], Call]:
    """One call of ours per grid, a dense one for the tokens, joined by their normalizers."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        from cogview2.ops.local_attention import local_attention_2d, merge_attentions

        layout = case.layout
        if not layout.tokens and not layout.cross_keys:
            raise NotForThisCaseError("only one part")
        attend = functools.partial(local_attention_2d, return_lse=True, backend=backend)

        def tokens() -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = _heads_first(inputs.additional_keys), _heads_first(inputs.additional_values)
            scores = (_query(inputs) @ keys.mT).float() / math.sqrt(case.channels)
            lse = scores.logsumexp(-1)
            out = (scores - lse[..., None]).exp().to(values.dtype) @ values
            return _on_grid(out, case), lse.transpose(1, 2).unflatten(1, layout.grid)

        def call() -> torch.Tensor:
            parts = [attend(inputs.query, inputs.key, inputs.value, case.window, is_causal=layout.is_causal)]
            if layout.cross_keys:
                window = layout.cross_kernel_size
                parts.append(attend(inputs.query, inputs.cross_key, inputs.cross_value, window))
            if layout.tokens:
                parts.append(tokens())
            outs, lses = zip(*parts, strict=True)
            return merge_attentions(outs, lses)[0]

        return call

    return prepare


# ---- dense


def eager_dense(case: Case, inputs: Inputs) -> Call:
    """Global attention with its scores in memory: what the paper's 40x and 1 % are about."""

    def call() -> torch.Tensor:
        scores = (_query(inputs) / math.sqrt(case.channels)) @ _keys(inputs).mT
        return _on_grid(scores.softmax(-1) @ _values(inputs), case)

    return call


def dense_sdpa(backend: SDPBackend, laid_out: bool = False) -> Callable[[Case, Inputs], Call]:
    """Global attention by one of PyTorch's fused kernels.

    Args:
        backend: which.
        laid_out: copy to contiguous [B, H, S, D] beforehand, outside what is timed (forward only).
    """

    def prepare(case: Case, inputs: Inputs) -> Call:
        ready = [part(inputs).contiguous() for part in (_query, _keys, _values)] if laid_out else None

        def call() -> torch.Tensor:
            query, key, value = ready or (_query(inputs), _keys(inputs), _values(inputs))
            with sdpa_kernel(backend):
                return _on_grid(F.scaled_dot_product_attention(query, key, value), case)

        return call

    return prepare


def masked_sdpa(case: Case, inputs: Inputs) -> Call:
    """PyTorch's attention with a mask of all pairs; the mask is made once."""
    mask = dense_mask(case.layout, inputs.query.device)

    def call() -> torch.Tensor:
        query, key, value = _query(inputs), _keys(inputs), _values(inputs)
        return _on_grid(F.scaled_dot_product_attention(query, key, value, attn_mask=mask), case)

    return call


# ---- FlexAttention


def flex(block_size: int, mode: str | None = None) -> Callable[[Case, Inputs], Call]:
    """FlexAttention with the exact mask, keys in raster order; mask blocks are made once, by the first call."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        keywords = inputs.keywords(case) | {"block_size": block_size, "mode": mode, "compiled": True}

        def call() -> torch.Tensor:
            out = local_attention_2d_flex(**keywords)
            assert isinstance(out, torch.Tensor)
            return out

        return call

    return prepare


def _tiled_order(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Raster index of every cell, 8x8 tile by tile, [rows * columns]."""
    raster = torch.arange(rows * columns, device=device).view(rows // TILE, TILE, columns // TILE, TILE)
    return raster.transpose(1, 2).flatten()


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=AUTOTUNED)


def tiled_flex(with_permutation: bool) -> Callable[[Case, Inputs], Call]:
    """FlexAttention over 8x8 tiles, which makes fewer blocks partly visible.

    Args:
        with_permutation: also time putting the tensors in that order and back.
    """

    def prepare(case: Case, inputs: Inputs) -> Call:
        layout = case.layout
        rows, columns = layout.grid
        if layout.tokens or layout.cross_keys or rows % TILE or columns % TILE:
            raise NotForThisCaseError(f"only a window alone, on grids of whole {TILE}x{TILE} tiles")
        above, left = case.window[0] // 2, case.window[1] // 2
        tiles = columns // TILE

        def place(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tile, inner = index // TILE**2, index % TILE**2
            return tile // tiles * TILE + inner // TILE, tile % tiles * TILE + inner % TILE

        def mask_mod(
            b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor
        ) -> torch.Tensor:
            (query_row, query_column), (key_row, key_column) = place(query), place(key)
            row, column = key_row - query_row, key_column - query_column
            seen = (row.abs() <= above) & (column.abs() <= left)
            return seen & ((row < 0) | ((row == 0) & (column <= 0))) if layout.is_causal else seen

        device = inputs.query.device
        mask = create_block_mask(
            mask_mod, None, None, layout.queries, layout.keys, device=device, BLOCK_SIZE=64
        )
        order = _tiled_order(rows, columns, device)
        back = order.argsort()

        def tiled(part: torch.Tensor) -> torch.Tensor:
            return part[:, :, order]

        parts = (_query, _keys, _values)
        ready = None if with_permutation else [tiled(part(inputs)) for part in parts]

        def call() -> torch.Tensor:
            query, key, value = ready or [tiled(part(inputs)) for part in parts]
            out = _compiled_flex()(query, key, value, block_mask=mask)
            return _on_grid(out[:, :, back] if with_permutation else out, case)

        return call

    return prepare


# ---- NATTEN


def natten(**tiles: Any) -> Callable[[Case, Inputs], Call]:
    """NATTEN's neighbourhood attention. Its windows move inward at borders: the same work, another result."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        if case.layout.is_causal or case.layout.cross_keys:
            raise NotForThisCaseError("it has no raster-causal window and no coarse grid")
        try:
            from natten.functional import na2d
        except ImportError as error:
            raise NotForThisCaseError("not installed") from error
        keywords = dict(tiles)
        if case.layout.tokens:
            keywords |= {
                "additional_keys": inputs.additional_keys,
                "additional_values": inputs.additional_values,
            }
        kernel_size = case.window
        return lambda: na2d(inputs.query, inputs.key, inputs.value, kernel_size=kernel_size, **keywords)

    return prepare


NATTEN_HOPPER = {
    "backend": "hopper-fna",
    "q_tile_shape": (8, 8),
    "kv_tile_shape": (8, 16),
    "backward_q_tile_shape": (8, 8),
    "backward_kv_tile_shape": (8, 16),
}

CPU_PEERS = (
    Peer("ours", ours("cpu")),
    Peer("masked SDPA", masked_sdpa),
    Peer("eager dense", eager_dense, exact=False),
    Peer("dense SDPA", dense_sdpa(SDPBackend.FLASH_ATTENTION), exact=False),
    Peer("FlexAttention", flex(128), backward=False),
    Peer("slices", slices),
    Peer("unfold", unfold),
)
GPU_PEERS = (
    Peer("eager dense", eager_dense, exact=False),
    Peer("dense flash", dense_sdpa(SDPBackend.FLASH_ATTENTION), exact=False),
    Peer("dense cudnn", dense_sdpa(SDPBackend.CUDNN_ATTENTION), exact=False),
    Peer("dense efficient", dense_sdpa(SDPBackend.EFFICIENT_ATTENTION), exact=False),
    Peer(
        "dense flash, laid out",
        dense_sdpa(SDPBackend.FLASH_ATTENTION, laid_out=True),
        exact=False,
        backward=False,
    ),
    Peer(
        "dense cudnn, laid out",
        dense_sdpa(SDPBackend.CUDNN_ATTENTION, laid_out=True),
        exact=False,
        backward=False,
    ),
    Peer("masked SDPA", masked_sdpa),
    Peer("FlexAttention 128", flex(128)),
    Peer("FlexAttention 128, autotuned", flex(128, AUTOTUNED)),
    Peer("FlexAttention 64, autotuned", flex(64, AUTOTUNED)),
    Peer("FlexAttention 8x8 tiles", tiled_flex(with_permutation=True)),
    Peer("FlexAttention 8x8 tiles, laid out", tiled_flex(with_permutation=False), backward=False),
    Peer("NATTEN", natten(), exact=False),
    Peer("NATTEN hopper-fna", natten(**NATTEN_HOPPER), exact=False),
    Peer("unfused (published algorithm)", published, backward=False),
    Peer("unfused (slices)", slices),
)
