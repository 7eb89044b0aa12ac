"""Styles are data: the published table, a person's own file, and nothing that leaks from picture to picture."""

from pathlib import Path

import pytest

from cogview2.pipeline.config.sampling import IterativeSRSamplingConfig, SamplingConfig
from cogview2.pipeline.errors import ConfigError
from cogview2.pipeline.sampling.styles import Style, find_style, load_styles

FLAT = {"base.temperature": 1.1, "direct.top_k_clusters": 5, "direct.cluster_temperature": 0.4}
PUBLISHED: dict[str, tuple[str, dict[str, float]]] = {
    "none": ("", {}),
    "mainbody": (" \u9ad8\u6e05\u6444\u5f71 \u9694\u7edd", {}),
    "photo": (" \u9ad8\u6e05\u6444\u5f71", {}),
    "flat": (" \u5e73\u9762\u98ce\u683c", FLAT),
    "comics": (" \u6f2b\u753b \u9694\u7edd", FLAT),
    "oil": (" \u6cb9\u753b\u98ce\u683c", {}),
    "sketch": (" \u7d20\u63cf\u98ce\u683c", {"base.temperature": 1.1}),
    "isometric": (" \u7b49\u8ddd\u77e2\u91cf\u56fe", {"base.temperature": 1.1}),
    "chinese": (" \u6c34\u58a8\u56fd\u753b", {"base.temperature": 1.12}),
    "watercolor": (" \u6c34\u5f69\u753b\u98ce\u683c", {}),
}


def _flat(sampling: SamplingConfig) -> dict[str, object]:
    values = sampling.model_dump()
    return {
        f"{section}.{name}": value
        for section in ("base", "direct", "iterative")
        for name, value in values[section].items()
    }


def _file(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_published_table() -> None:
    styles, plain = load_styles(), SamplingConfig()
    assert set(styles) == set(PUBLISHED)
    for name, (suffix, changes) in PUBLISHED.items():
        assert styles[name].prompt("a red circle") == "a red circle" + suffix
        changed = _flat(styles[name].sampling_for(plain))
        assert {key: value for key, value in changed.items() if value != _flat(plain)[key]} == changes


def test_nothing_stays_behind() -> None:
    """A published helper wrote into one shared object: `none` after another style kept its values."""
    ours = SamplingConfig(iterative=IterativeSRSamplingConfig(top_k=(3,)), batch=5)
    before = ours.model_copy(deep=True)
    flat, none = find_style("flat"), find_style("none")
    changed = flat.sampling_for(ours)
    assert changed.direct.top_k_clusters == 5 and changed.batch == 5 and changed.iterative.top_k == (3,)
    assert ours == before and none.sampling_for(ours) == before and none.prompt("x") == "x"
    assert find_style("flat") == flat


def test_own_styles(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        "wood:\n  suffix: carved\n  template: '{suffix} {{or}} {text}'\n  sampling: {iterative: {top_k: [4]}}\n"
        "oil:\n  suffix: thick oil\nplain:\n",
    )
    styles = load_styles(path)
    assert styles["wood"].prompt("a {text} {0}") == "carved {or} a {text} {0}"
    assert styles["wood"].sampling_for(SamplingConfig()).iterative.top_k == (4,)
    assert styles["oil"].prompt("x") == "x thick oil" and styles["plain"].prompt("x") == "x"
    assert styles["mainbody"] == load_styles()["mainbody"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wood: {colour: x}", "style 'wood' of .*my.yaml.*colour"),
        ("wood: {sampling: {base: {warmth: 1}}}", "warmth"),
        ("wood: {sampling: {base: {temperature: 0}}}", "temperature"),
        ("wood: {sampling: {batch: 3}}", "batch"),
        ("wood: {sampling: {iterative: {top_k: [1, 2]}}}", "top_k has 2 numbers"),
        ("wood: {template: no text}", "must hold {text} once"),
        ("wood: {template: '{text} {text}'}", "must hold {text} once"),
        ("wood: {template: '{text.x}'}", "must hold {text} once"),
        ("wood: {template: '{text!r}'}", "must hold {text} once"),
        ("wood: {template: '{text'}", "stray brace"),
        ("wood: [1]", "style 'wood'"),
        ("- wood", "must map names of styles"),
        ("wood: {}\nwood: {}", "stands twice"),
        ("wood: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_styles_that_cannot_be_used(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        load_styles(_file(tmp_path, text))
    assert "\n" not in str(error.value)


def test_unknown_and_unfitting_styles(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no style 'wood'; choose from chinese, comics"):
        find_style("wood")
    style = Style(sampling={"iterative": {"top_k": (1, 2, 3, 4, 5, 6)}})
    three = IterativeSRSamplingConfig(schedule="diagonal", rounds=3, top_k=(9,))
    with pytest.raises(ConfigError, match="do not fit.*3 rounds"):
        style.sampling_for(SamplingConfig(iterative=three))
