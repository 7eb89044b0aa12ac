"""report.html shows what a run has, names what it lacks, escapes everything, and loads nothing."""

import base64
import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from report_page import Page

from cogview2.launch import cli
from cogview2.launch.charts import chart, linear_ticks, log_ticks, number, thin
from cogview2.launch.report import picture, read_metrics, write_report
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.run_dir import RunDirectory, units

HOSTILE = '<script>alert("1")</script> & \'"><img src=x onerror=alert(2)> {{ 7 * 7 }}'
CHINESE = "红色的圆形在左边 <b>"
RECORD = {
    "digest": "d" * 64,
    "weights": {"of": "fake@600"},
    "protocol": {"captions": 200},
    "fid": {
        "network": "small-net <v1>, not comparable to papers",
        "comparable_to_papers": False,
        "reference": "held-out originals",
        "drawn": 400,
        "real": 1200,
        "too_few_pictures": False,
        "fid_0": 41.25,
        "fid_10": 3.5,
        "fid_2": 20.75,
    },
    "inception_score": {"mean": 4.5, "deviation": 0.25, "network": "small-net <v1>"},
    "caption_loss": {"en": {"caption_loss": 1.125, "real_caption_loss": 1.0625}},
    "reconstruction": {"base": {"l1": 0.031, "psnr": 25.5, "ssim": 0.912}},
    "caption_accuracy": {
        "en": {"base": 0.71, "direct": 0.74, "final": 0.765, "unseen_pairs": 0.385, "shuffled": 0.045},
        "zh": {"base": 0.61, "direct": 0.64, "final": None, "unseen_pairs": 0.285, "shuffled": 0.035},
    },
    "caption_accuracy_details": {
        "en": {"base": {"colour": 0.935, "shape": 0.5}, "final": {"colour": 0.955, "shape": 0.625}},
    },
    "oracle_on_originals": 0.995,
    "picture": {
        "rows": ["en base", "en final"],
        "captions": {"en": ["a held-out <caption>"], "training": ["a caption of training"]},
    },
    "captioning": {
        "en": {
            "pictures": 100,
            "ended": 1.0,
            "objects_named": 0.935,
            "examples": [{"original": "an <old> caption", "said": "a said caption"}],
        },
        "zh": {"pictures": 90, "ended": 0.5, "examples": []},
    },
    "ranking": {
        "en": {"captions": 50, "candidates": 4, "obeyed_on_average": 0.815, "obeyed_best_ranked": 0.885}
    },
    "editing": {"en": {"edits": 40, "obeyed": 0.775, "outside_l1": 0.0125, "vqvae_outside_l1": 0.0115}},
    "edited_picture": {"rows": ["before", "after"], "texts": ["a new <caption>"]},
}


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"".join(b"\0" + b"\x80" * width for _ in range(height)))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def log_lines(count: int, **values: float) -> str:
    return "".join(
        json.dumps({"step": 10 * k, "loss": 9.0 / k, **values}) + "\n" for k in range(1, count + 1)
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "fake").create(load_recipe("quickstart", []))


def finish(run: RunDirectory, unit: str, **extra: object) -> None:
    stage = run.stage(unit)
    stage.write_done({}, stage.output_files(), run.fingerprint(run.load_recipe(), unit), extra)


def fill(run: RunDirectory) -> None:
    """Let the run look finished."""
    for stage in (
        "train_tokenizer",
        "train_vqvae",
        "shard_dataset",
        "pretrain_coglm",
        "finetune_superres",
        "evaluate",
    ):
        run.stage(stage).create().new_attempt().write_result(0, 65.0)
        for unit in units(stage):
            run.stage(unit).create()
    vqvae, coglm = run.stage("train_vqvae"), run.stage("pretrain_coglm")
    vqvae.metrics.write_text(
        log_lines(30, loss_l1_rate4=0.25, loss_ms_ssim=0.0, codebook_used=0.875, codebook_perplexity=171.5)
        + '{"step": 310, "loss": NaN, "codebook_used": Infinity}\n{"step": 320, "lo'
    )
    for step in (500, 1000):
        (vqvae.samples / f"reconstructions_step_{step:09d}.png").write_bytes(png(272, 136))
    coglm.metrics.write_text(
        "not json\n[1]\n" + log_lines(600, loss_english=2.0, loss_image=1.0, grad_norm=1.0)
    )
    coglm.write_heartbeat(800, 800, loss=1.25, throughput=206.0, meters={"model_tflops": 0.123, "mfu": 0.5})
    for step in range(100, 1300, 100):
        (coglm.samples / f"prompts_step_{step:09d}.png").write_bytes(png(2 * 98, 98))
    (coglm.samples / "prompts.txt").write_text(f"{HOSTILE}\n{CHINESE}\n", encoding="utf-8")
    run.stage("finetune_superres/direct").metrics.write_text(log_lines(5, loss_codes=1.0, loss_accuracy=0.5))
    (run.stage("train_tokenizer").output / "report.json").write_text(
        json.dumps({"pieces": 4000, "unk_rate": 0.00125, "pieces_by_range": {"english": 94}})
    )
    shards = run.stage("shard_dataset").output
    (shards / "train").mkdir()
    (shards / "train" / "manifest.json").write_text(
        json.dumps({"shards": [{"samples": 500}, {"samples": 777}]})
    )
    (shards / "refused.json").write_text(
        json.dumps(
            {"source": "a folder", "refused": {"damaged": 3}, "examples": {"damaged": [f"x.png: {HOSTILE}"]}}
        )
    )
    evaluate = run.stage("evaluate")
    (evaluate.output / "evaluation.json").write_text(json.dumps(RECORD))
    (evaluate.output / "samples.png").write_bytes(png(12 * 66, 2 * 66))
    (evaluate.output / "edits.png").write_bytes(png(8 * 66, 2 * 66))
    for stage in ("train_tokenizer", "train_vqvae", "shard_dataset", "pretrain_coglm"):
        finish(run, stage, loss=1.5)


def test_a_run_that_was_never_started_says_what_is_missing(run: RunDirectory) -> None:
    page = Page(write_report(run.path))
    assert page.text.count("not started") == 8
    for words in (
        "evaluation (stage",
        "reconstructions (stage",
        "tokenizer report",
        "loss curve of train_vqvae",
    ):
        assert words in page.text
    assert "recipe.yaml, defaults included" in page.text
    assert not page.named("image") and not page.named("img")
    assert "not finished" in page.text


def test_the_whole_page(run: RunDirectory) -> None:
    fill(run)
    assert write_report(run.path) == run.report_path
    text = Page(run.report_path).text
    for words in (
        "damaged 3 x.png",
        "en base",
        "a held-out <caption>",
        "a caption of training",
        "a folder",
        "train 1,277 2",
        "english 2",
        "206 samples/s, 0.123 TFLOP/s, 50% MFU",
        "1 min 5 s",
        "pieces 4,000",
        "unk rate 0.125%",
        "pieces by range: english 94",
        "weights of fake@600",
        "en 71.0% 74.0% 76.5% 38.5% 4.5%",
        "zh 61.0% 64.0% – 28.5% 3.5%",
        "right in 99.5%",
        "en final 95.5% 62.5%",
        "blur radius k 0 2 10",
        "FID-k 41.25 20.75 3.5",
        "400 drawn pictures against 1,200 held-out originals",
        "Features of: small-net <v1>. Not comparable to figures in papers.",
        "4.5 ± 0.25",
        "en 1.125 1.062",
        "base 0.031 25.5 0.912",
        "perplexity 172",
        "en 100 93.5% 100.0%",
        "zh 90 – 50.0%",
        "an <old> caption a said caption",
        "en 50 4 81.5% 88.5%",
        "en 40 77.5% 0.0125 0.0115",
        "a new <caption>",
        "before after",
    ):
        assert words in text, words
    lost = text.partition("Left out, because it is not there: ")[2].partition(". ")[0]
    assert lost == "loss curve of finetune_superres/iterative (fewer than two logged steps)"


def test_everything_that_people_wrote_is_escaped(run: RunDirectory) -> None:
    fill(run)
    page = Page(write_report(run.path))
    assert not page.named("script")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script" not in page.source and "<img src=x" not in page.source
    assert page.text.count(HOSTILE) == 2  # the prompt, and the refused example; braces are no template either
    labels = [attributes["aria-label"] for attributes in page.named("svg") if "aria-label" in attributes]
    assert any(label.startswith(HOSTILE) for label in labels)
    assert CHINESE in page.text


def test_nothing_is_loaded_from_elsewhere(run: RunDirectory) -> None:
    fill(run)
    page = Page(write_report(run.path))
    links = [
        a[name] for _, a in page.tags for name in ("src", "href", "xlink:href", "action", "data") if name in a
    ]
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"https?:|@import|url\(", page.source)
    policy = next(
        a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    targets = {a["id"] for _, a in page.tags if "id" in a}
    assert {link[1:] for link in links if link.startswith("#")} <= targets


def test_pictures_are_cut_by_prompt_and_thinned_by_step(run: RunDirectory) -> None:
    fill(run)
    page = Page(write_report(run.path))
    strips = page.named("image")
    assert [base64.b64decode(a["href"].partition(",")[2]) for a in strips] == [png(196, 98)] * 8
    cells = [a["viewbox"] for a in page.named("svg") if "viewbox" in a and a["viewbox"].endswith("96 96")]
    assert cells == ["0 0 96 96"] * 8 + ["98 0 96 96"] * 8
    steps = re.findall(r"step (\d+)", page.text)
    assert steps[0] == "100" and "1200" in steps
    assert "original rate 4 rate 8 rate 16" in page.text
    assert "en base en final" in page.text


def test_strips_that_do_not_fit_the_prompts_are_shown_whole(run: RunDirectory) -> None:
    fill(run)
    samples = run.stage("pretrain_coglm").samples
    (samples / "prompts.txt").write_text("one\ntwo\nthree\n")
    page = Page(write_report(run.path))
    assert not page.named("image")
    assert len([a for a in page.named("img") if "drawn for the prompts" in a["alt"]]) == 8
    (samples / "prompts.txt").unlink()
    assert "one two three" not in Page(write_report(run.path)).text


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"fid": 3, "caption_accuracy": {"en": 1}, "weights": []}']
)
def test_damaged_files_of_a_run_do_not_stop_the_report(run: RunDirectory, damage: str) -> None:
    fill(run)
    (run.stage("evaluate").output / "evaluation.json").write_text(damage)
    (run.stage("shard_dataset").output / "refused.json").write_text(damage)
    (run.stage("train_tokenizer").output / "report.json").write_text(damage)
    run.stage("train_vqvae").done_path.write_text("{")
    (run.stage("evaluate").output / "samples.png").write_bytes(png(12, 12)[:-5])
    text = Page(write_report(run.path)).text
    assert "train_vqvae damaged record" in text
    assert "evaluation samples (stage evaluate)" in text


def test_all_evaluations_are_listed(run: RunDirectory) -> None:
    fill(run)
    (run.path / "evaluation").mkdir()
    for k, name in enumerate(("fake", "fake@400")):
        record = RECORD | {"digest": f"{k}" * 64, "weights": {"of": name}}
        (run.path / "evaluation" / f"{k}.json").write_text(json.dumps(record))
    text = Page(write_report(run.path)).text
    assert "All evaluations" in text
    assert "fake@400 111111111111 200 41.25 76.5% –" in text


def test_metrics_are_read_around_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 2.5, "n": "x"}\n{"step": 2, "lo\xff\n3\n{"loss": 1}\n{"step": 4, "loss": NaN}'
    )
    assert read_metrics(path) == [{"step": 1.0, "loss": 2.5}, {"step": 4.0}]
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("content", [b"", b"GIF89a", png(4, 4)[:30], png(4, 4)[:-3]])
def test_only_whole_png_files_are_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert picture(tmp_path / "a.png") is None
    assert picture(tmp_path / "b.png") is None


def test_row_names_need_a_picture_of_that_many_rows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(5, 12))
    for rows, kept in ((("a", "b", "c"), True), (("a",) * 5, False)):
        found = picture(tmp_path / "a.png", rows=rows)
        assert found is not None and (found.width, found.height) == (5, 12)
        assert found.rows == (rows if kept else ())


def test_charts_choose_their_axis() -> None:
    steep = chart("t", {"a": [(0, 100.0), (10, 1.0)], "b": [(0, 0.0), (5, 10.0), (10, 1.0)]}, y_label="loss")
    assert steep is not None and steep.y_label == "loss (log)"
    assert [line.path.count("L") for line in steep.lines] == [
        1,
        1,
    ]  # a logarithm has no place for the zero of b
    assert steep.lines[0].path.startswith(f"M{steep.left:g},")
    flat = chart("t", {"a": [(0, 2.0), (10, 1.0)]}, y_label="loss")
    assert flat is not None and flat.y_label == "loss"
    assert [tick.label for tick in flat.y_ticks] == ["0", "0.5", "1", "1.5", "2"]
    assert flat.lines[0].end == (flat.right, pytest.approx((flat.y_ticks[2].at), abs=0.2))
    constant = chart("t", {"a": [(0, 0.0), (10, 0.0)]}, y_label="y")
    assert constant is not None and len(constant.lines) == 1
    negative = chart("t", {"a": [(0, -50.0), (10, 1.0)]}, y_label="y")
    assert negative is not None and negative.y_label == "y"
    assert chart("t", {"a": [(0, 1.0)], "b": []}, y_label="y") is None


def test_long_series_are_thinned_by_means() -> None:
    points = [(float(k), float(k % 2)) for k in range(1000)]
    assert thin(points, 250) == [(float(4 * k + 3), 0.5) for k in range(250)]
    assert thin(points[:7], 250) == points[:7]
    found = chart("t", {"a": points}, y_label="y")
    assert found is not None and found.note == "each point is the mean of 5 logged values"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (50, 1500, [500, 1000, 1500]),
        (3, 3, [3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_linear_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert linear_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(0.9, 7.7), (1e-5, 2e3), (1e-30, 1e30)])
def test_log_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 8
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1500, "1500"), (0.03811, "0.0381"), (2.44e-5, "2.4e-05"), (1.5e7, "1.5e+07")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_the_command_writes_the_page(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.report_path}\n"
    assert "fake · CogView2 run" in run.report_path.read_text(encoding="utf-8")


def test_the_report_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, cogview2.launch.report; "
        "assert not {'torch', 'numpy', 'PIL', 'cogview2.stages'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_variables_that_look_like_secrets_stay_out_of_the_page(tmp_path: Path) -> None:
    words = " ".join(["hush"] * 60)  # long enough for the YAML to go on in a second line
    secret = [f"launch.environment.HF_TOKEN={words}", "launch.environment.NCCL_DEBUG=INFO"]
    made = RunDirectory(tmp_path / "r").create(load_recipe("quickstart", secret))
    text = Page(write_report(made.path)).text
    assert "hush" not in text and "HF_TOKEN: (redacted)" in text and "NCCL_DEBUG: INFO" in text
