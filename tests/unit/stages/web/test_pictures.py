"""Pictures in memory: names, limits, and what a PNG says about itself."""

import io

from PIL import Image

from cogview2.stages.web.pictures import PictureStore, encode


def test_a_png_carries_the_picture_and_its_facts() -> None:
    picture = Image.linear_gradient("L").convert("RGB")
    text = "\N{CJK UNIFIED IDEOGRAPH-7EA2} <b>"
    with Image.open(io.BytesIO(encode(picture, {"Description": text, "Seed": "7"}))) as read:
        assert read.text == {"Description": text, "Seed": "7"}  # type: ignore[attr-defined]
        assert read.tobytes() == picture.tobytes()


def test_names_cannot_be_guessed_and_are_never_paths() -> None:
    store = PictureStore()
    names = {store.add(b"picture") for _ in range(100)}
    assert len(names) == 100 and all(
        len(name) >= 22 and "/" not in name and "." not in name for name in names
    )
    assert store.get(names.pop()) == b"picture"
    assert store.get("../../etc/passwd") is None


def test_what_was_not_read_for_longest_is_dropped_first() -> None:
    store = PictureStore(most_bytes=10)
    first, second = store.add(b"1111"), store.add(b"2222")
    assert store.get(first) == b"1111"
    third = store.add(b"3333")
    assert (store.get(first), store.get(second), store.get(third)) == (b"1111", None, b"3333")
    large = store.add(b"x" * 50)  # the newest one is kept however large it is
    assert store.get(large) is not None and store.get(third) is None
    assert store.get(store.add(b"4444")) == b"4444" and store.get(large) is None
