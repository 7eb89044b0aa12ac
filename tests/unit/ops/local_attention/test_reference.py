"""The gather reference against dense attention under hand-checked masks."""

import pytest
import torch

from cogview2.ops.local_attention.reference import (
    dense_mask,
    dropout_keep,
    local_attention_2d_reference,
    similar,
    weighting,
    window_offsets,
)


def _picture(mask_row: torch.Tensor, width: int) -> list[str]:
    cells = "".join("#" if seen else "." for seen in mask_row.tolist())
    return [cells[start : start + width] for start in range(0, len(cells), width)]


@pytest.mark.parametrize(
    ("cell", "kernel", "causal", "picture"),
    [
        (12, (3, 3), False, [".....", ".###.", ".###.", ".###.", "....."]),
        (12, (3, 3), True, [".....", ".###.", ".##..", ".....", "....."]),
        (0, (5, 3), False, ["##...", "##...", "##...", ".....", "....."]),
        (9, (3, 5), True, ["..###", "..###", ".....", ".....", "....."]),
        (12, (2, 2), False, [".....", ".##..", ".##..", ".....", "....."]),
    ],
)
def test_local_window(cell: int, kernel: tuple[int, int], causal: bool, picture: list[str]) -> None:
    assert _picture(dense_mask((5, 5), (5, 5), kernel, causal)[cell], 5) == picture


def test_cross_window_is_centred_under_the_fine_cell() -> None:
    mask = dense_mask((9, 9), (3, 3), (3, 3))
    assert mask.shape == (81, 9)
    assert _picture(mask[0], 3) == ["##.", "##.", "..."]
    assert _picture(mask[4 * 9 + 5], 3) == ["###", "###", "###"]
    assert _picture(mask[8 * 9 + 2], 3) == ["...", "##.", "##."]


def test_released_windows_have_the_published_sizes() -> None:
    assert len(window_offsets((9, 5))) == 45
    assert len(window_offsets((9, 5), is_causal=True)) == 23
    assert len(window_offsets((17, 9), is_causal=True)) == 77


@pytest.mark.parametrize("causal", [False, True])
def test_joint_softmax_equals_dense_attention(causal: bool) -> None:
    torch.manual_seed(0)
    B, N, G, K, T, ratio = 2, 3, 6, 4, 5, 2
    q, k, v = torch.randn(3, B, G, G, N, K, dtype=torch.float64).unbind()
    ck, cv = torch.randn(2, B, G // ratio, G // ratio, N, K, dtype=torch.float64).unbind()
    tk, tv = torch.randn(2, B, T, N, K, dtype=torch.float64).unbind()
    bias = torch.tensor([[0.0, 0.5, -1e4, 0.0, -torch.inf], [0.0] * 5], dtype=torch.float64)
    out, lse = local_attention_2d_reference(
        q,
        k,
        v,
        (5, 3),
        is_causal=causal,
        cross_key=ck,
        cross_value=cv,
        cross_kernel_size=(3, 3),
        cross_bias=0.25,
        additional_keys=tk,
        additional_values=tv,
        additional_bias=bias,
    )
    keys = torch.cat([tk, ck.flatten(1, 2), k.flatten(1, 2)], 1).transpose(1, 2)
    values = torch.cat([tv, cv.flatten(1, 2), v.flatten(1, 2)], 1).transpose(1, 2)
    coarse = G // ratio
    cross = dense_mask((G, G), (coarse, coarse), (3, 3))
    visible = torch.cat([torch.ones(G * G, T).bool(), cross, dense_mask((G, G), (G, G), (5, 3), causal)], 1)
    scores = q.flatten(1, 2).transpose(1, 2) @ keys.mT * K**-0.5
    scores[..., :T] += bias[:, None, None]
    scores[..., T : T + coarse**2] += 0.25
    scores = scores.masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), scores.softmax(-1) @ values)
    torch.testing.assert_close(lse.flatten(1, 2).transpose(1, 2), scores.logsumexp(-1))


def test_dropout_keeps_about_the_share_asked_for_and_follows_the_seed() -> None:
    seed = torch.tensor([2**61 + 12345])
    keep = dropout_keep(seed, 2, 3, 50, 70, 0.3)
    # 21,000 draws: the share lies within 0.02 of 0.7 but for one time in 10^9.
    assert abs(keep.float().mean().item() - 0.7) < 0.02
    assert torch.equal(keep, dropout_keep(seed, 2, 3, 50, 70, 0.3))
    flipped = (dropout_keep(seed + 1, 2, 3, 50, 70, 0.3) != keep).float().mean().item()
    assert abs(flipped - 2 * 0.3 * 0.7) < 0.03


def test_gradients_of_grouped_anisotropic_windows() -> None:
    torch.manual_seed(0)
    q = torch.randn(4, 1, 4, 6, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 1, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return weighting(similar(q, k, (3, 3)).softmax(-1), v, (3, 3))

    assert torch.autograd.gradcheck(attention, (q, k, v))


def test_scores_outside_are_minus_ten_thousand_and_half_is_accumulated_in_float() -> None:
    q = torch.full((1, 1, 2, 2, 64), 8.0, dtype=torch.float16)
    scores = similar(q, q, (3, 3))
    assert scores.dtype == torch.float16
    assert (scores == -10000).sum() == 4 * 5
    assert scores.max() == 64 * 64


@pytest.mark.parametrize(("kernel", "causal"), [((0, 3), False), ((4, 3), True)])
def test_impossible_windows_are_refused(kernel: tuple[int, int], causal: bool) -> None:
    with pytest.raises(ValueError, match=r"\(9, 5\)"):
        window_offsets(kernel, causal)


def test_grids_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        similar(torch.zeros(1, 1, 5, 4, 2), torch.zeros(1, 1, 2, 2, 2), (3, 3))
    with pytest.raises(ValueError, match="multiple"):
        dense_mask((7, 7), (3, 3), (3, 3))
