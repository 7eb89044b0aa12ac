"""The benchmark scripts from their arguments to their tables, on tiny cases."""

import itertools
import json
from pathlib import Path
from typing import Any

import bench_cpu
import bench_gpu
import measure
import pytest
import report
import torch
from cases import HEADLINE, TINY_CASES
from peers import Peer


def _results(folder: Path) -> Path:
    path = folder / "RESULTS.md"
    path.write_text(
        "top\n<!-- cpu -->\nold\n<!-- end of cpu -->\n<!-- gpu -->\nold\n<!-- end of gpu -->\nend\n"
    )
    return path


def test_the_cpu_benchmark_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["--quick", "--no-memory", "--only", "tiny", "--peers", "masked SDPA", "--rounds", "1"]
    try:
        bench_cpu.main(
            [*arguments, "--json", str(tmp_path / "new/cpu.json"), "--results", str(_results(tmp_path))]
        )
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "new/cpu.json").read_text())
    assert {case["case"] for case in record["cases"]} == {case.name for case in TINY_CASES}
    for case in record["cases"]:
        assert case["seconds"]["forward"]["masked SDPA"] > 0
        assert case["seconds"]["both"]["masked SDPA"] > 0
    written = (tmp_path / "RESULTS.md").read_text()
    assert written.startswith("top\n<!-- cpu -->\n| what | value |")
    assert "| forward vs masked SDPA |" in written
    assert written.endswith("<!-- end of cpu -->\n<!-- gpu -->\nold\n<!-- end of gpu -->\nend\n")
    assert "| masked SDPA |" in capsys.readouterr().out


def test_the_gpu_benchmark_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_gpu.main(["--device", "cpu", "--tiny", "--json", str(tmp_path / "gpu.json"), "--only", "s"])
    record = json.loads((tmp_path / "gpu.json").read_text())
    for table in record["tables"]:
        assert table["rows"]["masked SDPA"]["backward"] > 0
        # There is no such kernel on the CPU: the sentence stands in its row, and the rest is there.
        assert "backend" in table["rows"]["dense flash"].get("failed", "backend")
    assert "tiny" in {table["case"] for table in record["tables"]}
    assert "TFLOP/s" in capsys.readouterr().out


def test_a_run_without_a_device_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main(["--device", "cpu"]) == 2
    assert "--tiny" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench_gpu.main([]) == 1
        assert "needs a CUDA device" in capsys.readouterr().err


def test_a_failing_peer_leaves_its_sentence() -> None:
    def fail(*_: object) -> Any:
        raise MemoryError("CUDA out of memory. Tried\n to allocate | much")

    bench = bench_gpu.Bench(torch.device("cpu"), 1, 60)
    row = bench.measure(Peer("broken", fail), bench_gpu.jobs(True)[0])
    assert row == {"failed": "MemoryError: CUDA out of memory. Tried to allocate / much"}
    late = bench_gpu.Bench(torch.device("cpu"), 1, -1)
    assert "--seconds" in late.measure(Peer("late", fail), bench_gpu.jobs(True)[0])["failed"]


def test_every_wanted_table_of_the_gpu_is_planned_once() -> None:
    planned = [
        (job.case.name, job.batch, job.dtype)
        for job in bench_gpu.jobs(False)
        if job.names != bench_gpu.PATIENT
    ]
    assert len(planned) == len(set(planned)) == 4 * 3 * 2
    assert planned[0] == (HEADLINE.name, 8, "bf16")
    names = {peer.name for peer in bench_gpu.ours_and_peers(torch.device("cuda"))}
    assert all(set(job.names) <= names for job in bench_gpu.jobs(False))
    headline = [job for job in bench_gpu.jobs(False) if job.title == bench_gpu.jobs(False)[0].title]
    assert all(sum(job.takes(name) for job in headline) == 1 for name in names - {bench_gpu.MERGED})


def test_gpu_targets_take_the_best_competitor() -> None:
    rows = {
        "eager dense": {"forward": 14e-3, "backward": 30e-3, "both": 44e-3, "extra forward": 26 << 30},
        "dense flash": {"forward": 4e-3, "backward": 10e-3, "both": 14e-3},
        "dense cudnn": {"forward": 3e-3, "failed": "no backward"},
        "FlexAttention 128": {"forward": 1.2e-3, "backward": 3e-3, "both": 4.2e-3},
        "FlexAttention 64, autotuned": {"failed": "OutOfMemoryError"},
        "NATTEN": {"failed": "not installed"},
        "ours": {"forward": 0.3e-3, "backward": 1e-3, "both": 1.3e-3, "extra forward": 200 << 20},
    }
    bench = bench_gpu.Bench(torch.device("cpu"), 1, 60)
    bench.copy_rate = 4.3e12
    record = {"case": HEADLINE.name, "batch": 8, "dtype": "bf16", "rows": rows}
    found = {target.title: target for target in bench_gpu.targets([record], bench)}
    assert found["forward vs best dense SDPA"].measured == pytest.approx(10)
    assert found["forward vs best FlexAttention"].verdict() == "aim reached"
    assert found["forward, share of the copy rate"].measured == pytest.approx(62.9, abs=0.1)
    assert found["forward, share of the copy rate"].verdict() == "least reached"
    assert found["forward vs NATTEN"].verdict() == "open"
    assert found["extra memory forward, of eager dense"].verdict() == "aim reached"
    assert found["extra memory with backward, of eager dense"].verdict() == "open"
    assert found["backward vs dense flash"].verdict() == "aim reached"


def test_verdicts_and_cells() -> None:
    assert report.Target("a", 19.9, 20, 45).verdict() == "**missed**"
    assert report.Target("a", 3.1, 3, 1.5, "%", at_most=True).verdict() == "**missed**"
    assert report.Target("a", 2.0, 3, 1.5, "%", at_most=True).verdict() == "least reached"
    assert report.ratio("it broke", 2.0) == "it broke"
    assert report.ratio(1.0, None) == "not measured"
    long = "a sentence that is far too long for a cell"
    assert report.table(["a", "b"], [["x", long], ["y", long]]).endswith(
        f"| x | (1) |\n| y | (1) |\n\n(1) {long}  "
    )


def test_a_results_file_without_its_section_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("nothing here\n")
    with pytest.raises(ValueError, match="<!-- cpu -->"):
        report.write_section(path, "cpu", "new")
    assert path.read_text() == "nothing here\n"


def test_memory_is_the_peak_of_the_call() -> None:
    def call() -> torch.Tensor:
        return torch.ones(32 << 20, dtype=torch.uint8).clone()[:1].clone()

    try:
        extra = measure.extra_host_bytes(call)
    except OSError as error:
        pytest.skip(f"this kernel keeps its high-water marks: {error}")
    assert 60 << 20 < extra < 80 << 20


def test_the_rotation_keeps_the_least_and_the_sentences() -> None:
    ticks = itertools.count()

    def fail() -> None:
        raise RuntimeError("no kernel")

    found = measure.interleaved_minimum({"a": lambda: None, "b": fail}, 2, lambda: float(next(ticks)))
    assert found == {"a": 1.0, "b": "RuntimeError: no kernel"}
