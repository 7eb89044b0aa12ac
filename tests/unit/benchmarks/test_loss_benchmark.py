"""The benchmark of the loss: its candidates do the same work, and it prints its ratios."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks/training"))

import bench_loss  # noqa: E402


@pytest.fixture(autouse=True)
def same_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_all_candidates_give_the_same_loss_and_gradients() -> None:
    case = bench_loss.Case(bench_loss._options(["--quick"]))
    assert bench_loss.difference(case, bench_loss.NAMES) < 1e-6
    expected, *others = (case.call(name)() for name in bench_loss.NAMES)
    for found in others:
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert case.gradient_bytes == sum(gradient.nbytes for gradient in expected)


def test_it_prints_and_writes_its_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, record = tmp_path / "RESULTS.md", tmp_path / "loss.json"
    results.write_text("top\n<!-- loss -->\nold\n<!-- end of loss -->\nend\n")
    arguments = ["--quick", "--no-memory", "--results", str(results), "--json", str(record)]
    assert bench_loss.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| time, of naive |" in printed and "| every position |" in printed
    assert "| peak memory, of naive | not measured |" in printed
    assert "\nold\n" not in results.read_text() and "| chunked |" in results.read_text()
    seconds = json.loads(record.read_text())["seconds"]
    assert set(seconds) == set(bench_loss.NAMES) and all(len(values) == 1 for values in seconds.values())


def test_memory_of_a_fresh_process_counts_the_logits() -> None:
    sizes = [
        "--vocabulary",
        "20000",
        "--hidden",
        "16",
        "--batch",
        "1",
        "--length",
        "800",
        "--positions",
        "800",
    ]
    found = bench_loss.memory_of("naive", bench_loss._options([*sizes, "--threads", "1"]))
    logits = 800 * 20_000 * 4
    assert isinstance(found, float) and 2 * logits < found < 5 * logits


def test_targets_follow_the_bounds() -> None:
    memory, beyond, time = bench_loss.targets(
        {"chunked": 1.1, "naive": 1.0}, {"chunked": 30.0, "naive": 100.0}, gradients=10
    )
    assert (memory.verdict(), time.verdict()) == ("**missed**", "least reached")
    assert beyond.measured == pytest.approx(100 * 20 / 90)
    memory, beyond, time = bench_loss.targets(
        {"chunked": 1.2, "naive": 1.0}, {"chunked": 20.0, "naive": 100.0}, gradients=19
    )
    assert (memory.verdict(), beyond.verdict(), time.verdict()) == (
        "aim reached",
        "aim reached",
        "**missed**",
    )
    assert [target.verdict() for target in bench_loss.targets({"chunked": 1.0}, {}, 0)] == ["open"] * 3


@pytest.mark.parametrize(
    "wrong", [["--only", "nothing"], ["--positions", "0"], ["--positions", "9999", "--length", "8"]]
)
def test_wrong_arguments_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench_loss.main(["--no-memory", *wrong])
