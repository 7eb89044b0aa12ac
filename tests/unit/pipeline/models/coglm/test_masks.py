"""Who sees whom, as pictures."""

import pytest
import torch

from cogview2.pipeline.models.coglm.masks import (
    CONTEXT,
    HIDDEN,
    IMAGE,
    attention_mask,
    segment_role,
    segments,
)

CAPTION_A, CAPTION_B = segment_role(2, reads_image=True), segment_role(3, reads_image=True)

CASES = {
    "generation: text t t, unused pad, start, three codes": (
        [CONTEXT, CONTEXT, HIDDEN, IMAGE, IMAGE, IMAGE],
        ["##....", "##....", "##....", "##.#..", "##.##.", "##.###"],
    ),
    "understanding: two captions, pad, context code, patch codes": (
        [CAPTION_A, CAPTION_A, CAPTION_B, CAPTION_B, HIDDEN, CONTEXT, IMAGE, IMAGE],
        ["#....###", "##...###", "..#..###", "..##.###", ".....#..", ".....#..", ".....##.", ".....###"],
    ),
    "text: context, region, context, region, tail": (
        [CONTEXT, IMAGE, IMAGE, CONTEXT, IMAGE, IMAGE, IMAGE],
        ["#..#...", "##.#...", "####...", "#..#...", "#####..", "######.", "#######"],
    ),
    "nothing visible": ([HIDDEN, HIDDEN], ["..", ".."]),
}


@pytest.mark.parametrize("name", CASES)
def test_picture(name: str) -> None:
    roles, picture = CASES[name]
    mask = attention_mask(torch.tensor([roles]))
    assert mask.dtype == torch.bool and mask.shape == (1, 1, len(roles), len(roles))
    assert ["".join(".#"[seen] for seen in row) for row in mask[0, 0].int().tolist()] == picture


def test_samples_of_a_batch_do_not_mix() -> None:
    roles = [case[0][:2] for case in CASES.values()]
    batch = attention_mask(torch.tensor(roles))
    for row, single in zip(batch, roles, strict=True):
        assert torch.equal(row, attention_mask(torch.tensor([single]))[0])


def test_roles_keep_their_segment() -> None:
    assert segments(torch.tensor([HIDDEN, CONTEXT, IMAGE, CAPTION_A, CAPTION_B])).tolist() == [0, 0, 1, 2, 3]
