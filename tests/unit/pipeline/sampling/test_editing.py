"""The editing procedure with tiny random models: what may change, what must not, and what is run."""

from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from PIL import Image
from tiny_cascade import VOCABULARY, Letters, facade, make_parts

from cogview2.pipeline.config.sampling import EditingConfig, SamplingConfig
from cogview2.pipeline.data.pixels import downsample
from cogview2.pipeline.errors import DataError
from cogview2.pipeline.sampling import editing
from cogview2.pipeline.sampling.editing import Edited, edit, full_size
from cogview2.pipeline.sampling.regions import Box, cells_of
from cogview2.pipeline.sampling.reranking import caption_log_likelihood
from cogview2.pipeline.sampling.styles import Style
from cogview2.pipeline.sampling.text_to_image import TextToImage

FULL, PLAIN = 64, EditingConfig(harmonise=False)
LARGE, SMALL = Box(8, 8, 40, 40), Box(4, 20, 20, 36)


@pytest.fixture(scope="module")
def parts() -> dict[str, object]:
    return make_parts()


@pytest.fixture
def cascade(parts: dict[str, object]) -> TextToImage:
    return facade(parts)


PICTURE = np.random.default_rng(0).integers(0, 256, (FULL, FULL, 3), dtype=np.uint8)


def _pixels(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def _bytes(pixels_B3HW: torch.Tensor) -> np.ndarray:
    return (pixels_B3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_outside_of_the_crop_every_pixel_stays(cascade: TextToImage) -> None:
    found = edit(cascade, PICTURE, LARGE, "red", config=PLAIN)
    assert full_size(cascade) == FULL and found.pictures.shape == (1, FULL, FULL, 3)
    assert found.crop == Box(1, 1, 46, 46) and np.array_equal(found.before, PICTURE)
    outside = np.ones((FULL, FULL), dtype=bool)
    outside[found.crop.slices] = False
    assert np.array_equal(found.pictures[0][outside], PICTURE[outside])
    assert (found.pictures[0] != PICTURE)[found.mask].any()


def test_the_crop_is_the_decoded_codes(cascade: TextToImage) -> None:
    found = edit(cascade, PICTURE, LARGE, "red", config=PLAIN)
    assert found.fine_codes is not None
    decoded = cascade.image_tokenizer.decode(found.fine_codes)
    expected = _bytes(functional.interpolate(decoded, size=(45, 45), mode="nearest"))
    assert np.array_equal(found.pictures[0][found.crop.slices], expected[0])


def test_codes_outside_of_the_region_are_the_pictures(cascade: TextToImage) -> None:
    found = edit(cascade, PICTURE, LARGE, "red", candidates=4, config=PLAIN)
    crop = _pixels(PICTURE[found.crop.slices])
    encode = cascade.image_tokenizer.encode
    base = encode(downsample(crop, 32))
    known = torch.from_numpy(~found.redrawn.ravel())
    assert 0 < known.sum() < 16
    assert torch.equal(found.base_codes[:, known], base[:, known].expand(4, -1))
    assert (found.base_codes[:, ~known] != base[:, ~known]).any()
    fine = encode(functional.interpolate(crop, size=(64, 64), mode="bilinear").clamp(0, 1))
    known = torch.from_numpy(~cells_of(found.mask[found.crop.slices], 8).ravel())
    assert found.fine_codes is not None
    assert torch.equal(found.fine_codes[:, known], fine[:, known].expand(4, -1))


def test_a_small_crop_needs_no_super_resolution(
    cascade: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editing, "direct_superres", None)
    found = edit(cascade, PICTURE, SMALL, "red", config=PLAIN)
    assert found.crop.width == 22 and found.fine_codes is None
    decoded = cascade.image_tokenizer.decode(found.base_codes)
    expected = _bytes(functional.interpolate(decoded, size=(22, 22), mode="nearest"))
    assert np.array_equal(found.pictures[0][found.crop.slices], expected[0])


def test_without_super_resolution(parts: dict[str, object]) -> None:
    cascade = facade(parts, direct=None, iterative=None)
    found = edit(cascade, PICTURE, LARGE, "red")
    assert found.pictures.shape == (1, 32, 32, 3) and found.fine_codes is None
    only_direct = edit(facade(parts, iterative=None), PICTURE, LARGE, "red")
    assert only_direct.fine_codes is not None


def test_harmonising_is_one_encoding_and_decoding(cascade: TextToImage) -> None:
    plain = edit(cascade, PICTURE, LARGE, "red", config=EditingConfig(harmonise=False))
    found = edit(cascade, PICTURE, LARGE, "red", config=EditingConfig(harmonise=True))
    tokenizer = cascade.image_tokenizer
    assert found.fine_codes is not None
    side = found.crop.width
    whole = _pixels(found.before)
    rows, columns = found.crop.slices
    decoded = tokenizer.decode(found.fine_codes)
    whole[:, :, rows, columns] = functional.interpolate(decoded, size=(side, side), mode="nearest")
    assert whole.min() < 0 or whole.max() > 1  # pasted as decoded, not clamped
    expected = _bytes(tokenizer.decode_grid(tokenizer.vqvae.encode(whole, tokenizer.rate)))
    assert np.array_equal(found.pictures, expected)
    assert not np.array_equal(found.pictures, plain.pictures)


def test_paste_region_keeps_the_rest_of_the_crop(cascade: TextToImage) -> None:
    whole = edit(cascade, PICTURE, LARGE, "red", config=PLAIN)
    found = edit(cascade, PICTURE, LARGE, "red", config=EditingConfig(harmonise=False, paste="region"))
    assert np.array_equal(found.pictures[0][found.mask], whole.pictures[0][found.mask])
    assert np.array_equal(found.pictures[0][~found.mask], PICTURE[~found.mask])


def test_crop_share_cells_and_order_have_effect(cascade: TextToImage) -> None:
    def run(**options: object) -> Edited:
        config = EditingConfig(harmonise=False, **options)  # type: ignore[arg-type]
        return edit(cascade, PICTURE, LARGE, "red", candidates=8, ranked=False, config=config)

    plain = run()
    assert run(crop="whole").crop == Box(0, 0, FULL, FULL)
    assert run(region_share=0.9).crop.width == 35
    assert (run(cells="touched").redrawn & ~plain.redrawn).any()
    before, after = (run(crop="whole", known=known).base_codes for known in ("before", "all"))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("second", [False, True])
def test_every_model_gets_the_same_text(
    cascade: TextToImage, second: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, chosen = [], []

    def spy_infill(
        model: object, text_ids: object, *rest: object, run=editing.infill, **options: object
    ) -> object:
        chosen.append((text_ids, options["second_start_of_image"]))
        return run(model, text_ids, *rest, **options)

    monkeypatch.setattr(editing, "infill", spy_infill)
    for name in ("direct_superres", "iterative_superres"):
        function = getattr(editing, name)

        def spy(model: object, text_ids: object, *rest: object, run=function, **options: object) -> object:
            texts.append(text_ids)
            return run(model, text_ids, *rest, **options)

        monkeypatch.setattr(editing, name, spy)
    config = EditingConfig(second_start_of_image=second)
    edit(cascade, PICTURE, LARGE, "ab", candidates=2, config=config)
    assert chosen == [(Letters().encode("ab"), second)]
    ids = Letters().encode("ab") + ([VOCABULARY.start_of_image] if second else [])
    assert texts == [[ids, ids], [ids, ids]]


def test_model_runs(cascade: TextToImage) -> None:
    runs = dict.fromkeys(("coglm", "direct", "iterative"), 0)
    handles = []
    for name in runs:

        def count(*_: object, name: str = name) -> None:
            runs[name] += 1

        handles.append(getattr(cascade, name).register_forward_pre_hook(count))
    found = edit(cascade, PICTURE, LARGE, "red")
    for handle in handles:
        handle.remove()
    assert runs == {"coglm": int(found.redrawn.sum()), "direct": 1, "iterative": 6}


def test_a_candidate_depends_on_seed_and_number_alone(parts: dict[str, object]) -> None:
    cascade = facade(parts)
    four = edit(cascade, PICTURE, LARGE, "red", seed=3, number=5, candidates=4, ranked=False)
    assert four.numbers == (5, 6, 7, 8) and four.scores is None
    small = edit(facade(parts, batch=3), PICTURE, LARGE, "red", seed=3, number=5, candidates=4, ranked=False)
    assert torch.equal(four.base_codes, small.base_codes)
    assert torch.equal(cast(torch.Tensor, four.fine_codes), cast(torch.Tensor, small.fine_codes))
    alone = edit(cascade, PICTURE, LARGE, "red", seed=3, number=7)
    assert np.array_equal(alone.pictures[0], four.pictures[2])
    other = edit(cascade, PICTURE, LARGE, "red", seed=4, number=7)
    assert not torch.equal(other.base_codes, alone.base_codes)


def test_ranking_puts_the_likeliest_first(cascade: TextToImage) -> None:
    drawn = edit(cascade, PICTURE, LARGE, "red", candidates=5, ranked=False)
    found = edit(cascade, PICTURE, LARGE, "red", candidates=5)
    ids = Letters().encode("red")
    scores = caption_log_likelihood(cascade.coglm, [ids] * 5, drawn.base_codes, VOCABULARY)
    order = scores.argsort(descending=True).tolist()
    assert found.numbers == tuple(order) and order != [0, 1, 2, 3, 4]
    assert found.scores is not None
    assert found.scores.tolist() == pytest.approx(sorted(scores.tolist(), reverse=True))
    assert np.array_equal(found.pictures, drawn.pictures[order])
    assert torch.equal(found.base_codes, drawn.base_codes[order])


def test_a_mask_of_the_box_is_the_box(cascade: TextToImage) -> None:
    mask = np.zeros((FULL, FULL), dtype=bool)
    mask[LARGE.slices] = True
    box, marked = (edit(cascade, PICTURE, region, "red") for region in (LARGE, mask))
    assert np.array_equal(box.pictures, marked.pictures)


def test_the_whole_picture(cascade: TextToImage) -> None:
    found = edit(cascade, PICTURE, Box(0, 0, FULL, FULL), "red")
    assert found.redrawn.all() and found.crop == Box(0, 0, FULL, FULL)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_pictures_of_other_modes(cascade: TextToImage, mode: str) -> None:
    given = Image.fromarray(PICTURE).convert(mode)
    found = edit(cascade, given, LARGE, "red")
    assert found.before.shape == (FULL, FULL, 3)


def test_the_recipe_gives_the_defaults(parts: dict[str, object]) -> None:
    cascade = facade(parts, sampling=SamplingConfig(editing=EditingConfig(crop="whole")))
    assert edit(cascade, PICTURE, LARGE, "red").crop == Box(0, 0, FULL, FULL)


def test_a_style_is_added_to_the_text_but_not_scored(
    cascade: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, scored = [], []

    def spy_infill(
        model: object, text_ids: object, *rest: object, run=editing.infill, **options: object
    ) -> object:
        chosen.append((text_ids, options["config"]))
        return run(model, text_ids, *rest, **options)

    def spy_rank(
        model: object, text_ids: object, *rest: object, run=editing.rank, **options: object
    ) -> object:
        scored.append(text_ids)
        return run(model, text_ids, *rest, **options)

    monkeypatch.setattr(editing, "infill", spy_infill)
    monkeypatch.setattr(editing, "rank", spy_rank)
    style = Style(suffix="oil", sampling={"base": {"temperature": 0.7}})
    edit(cascade, PICTURE, LARGE, "red", candidates=2, style=style)
    assert chosen[0][0] == Letters().encode("red oil") and chosen[0][1].temperature == 0.7
    assert scored == [Letters().encode("red")]
    assert cascade.sampling.base.temperature == 1.15


def test_refusals(cascade: TextToImage) -> None:
    with pytest.raises(DataError, match="prompt 0 is empty"):
        edit(cascade, PICTURE, LARGE, " ")
    with pytest.raises(DataError, match="not inside the picture"):
        edit(cascade, PICTURE, Box(0, 0, 65, 2), "red")
    with pytest.raises(ValueError, match="draw at least 1"):
        edit(cascade, PICTURE, LARGE, "red", candidates=0)
