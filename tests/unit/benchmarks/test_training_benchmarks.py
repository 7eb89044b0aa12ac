"""The benchmarks of training, on tiny models: same work for all candidates, their tables, their sentences."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.coglm.model import CogLM

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks/training"
sys.path.append(str(FOLDER))

import bench_engine  # noqa: E402
import bench_gpu_training  # noqa: E402
import gpu_engines  # noqa: E402
import synthetic  # noqa: E402

TINY = ["--layers", "2", "--hidden", "32", "--heads", "2", "--rows", "200"]
ON_CPU = [
    *TINY,
    "--device",
    "cpu",
    "--engine",
    "bare",
    "--accumulation",
    "2",
    "--steps",
    "1",
    "--warm-up",
    "0",
]


def config(layers: int = 2) -> CogLMConfig:
    return CogLMConfig(
        layers=layers, hidden=32, heads=2, dropout=0.0, max_positions=40, text_length=8, image_position=20
    )


def _results(folder: Path, section: str) -> Path:
    path = folder / "RESULTS.md"
    path.write_text(f"top\n<!-- {section} -->\nold\n<!-- end of {section} -->\nend\n")
    return path


def test_samples_predict_every_code_and_nothing_else() -> None:
    batch = synthetic.samples(config(), 200, 3, 0, torch.device("cpu"))
    cells, text = 40 - 20 - 1, 8
    assert {tuple(value.shape) for value in batch.values()} == {(3, text + cells)}
    assert batch["loss_mask"].sum(1).tolist() == [cells] * 3
    assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
    assert int(batch["labels"].max()) < synthetic.vocabulary(200).image_codes
    assert batch["position_ids"][0].tolist() == [*range(text - 1), *range(20, 20 + cells + 1)]


@pytest.mark.slow
@pytest.mark.distributed
def test_all_loops_of_the_engine_benchmark_train_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--ranks", "2", "--micro-batch", "1", "--accumulation", "2", "--steps", "2"]
    results, record = _results(tmp_path, "engine"), tmp_path / "engine.json"
    arguments += ["--turns", "2", "--results", str(results), "--json", str(record)]
    assert bench_engine.main(arguments) == 0
    found: dict[str, Any] = json.loads(record.read_text())["turns"]["2"]
    assert list(found) == [
        bench_engine.BARE,
        *(f"{who}, ZeRO-{stage}" for stage in (0, 1) for who in ("bare DeepSpeed loop", "ours")),
    ]
    reference = found[bench_engine.BARE]["losses"]
    assert len(reference) == 2 and reference[1] < reference[0]
    for figures in found.values():
        assert figures["losses"] == pytest.approx(reference, rel=1e-4)
        assert len(figures["cpu"]) == len(figures["wall"]) == 2 and min(figures["cpu"]) > 0
    assert "| CPU time over the bare loop, 2 ranks, ZeRO-1 |" in results.read_text()
    assert "of bare" in capsys.readouterr().out


def test_ratios_are_of_the_least_disturbed_turns() -> None:
    found = {bench_engine.BARE: {"cpu": [3.0, 10.0, 2.0]}, "ours, ZeRO-0": {"cpu": [2.2, 10.5, 2.4]}}
    assert bench_engine.ratio(found, "ours, ZeRO-0", "cpu") == pytest.approx(1.1)
    (one, two) = bench_engine.targets({2: found | {"ours, ZeRO-1": {"cpu": [2.0]}}})
    assert (one.verdict(), two.verdict()) == ("least reached", "aim reached")


def test_the_gpu_benchmark_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, profile = _results(tmp_path, "training gpu"), tmp_path / "new/profile.txt"
    arguments = [*ON_CPU, "--sweep", "1/0/0,2/9/0.1", "--results", str(results), "--profile", str(profile)]
    assert bench_gpu_training.main(arguments) == 0
    written = results.read_text()
    assert "| micro batch 2, 2 layers recomputed, dropout 0.1 | sdpa |" in written
    assert "no figure on paper" in written and "| open |" in written
    assert "aten::" in profile.read_text() and profile.read_text().strip() in written
    assert "of a matrix product" in capsys.readouterr().out


def test_a_setting_that_fails_leaves_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench_gpu_training._options([*ON_CPU, "--seconds", "1000"])
    bench = bench_gpu_training.Bench(options, torch.device("cpu"))

    def fail(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate | much")

    monkeypatch.setattr(bench.engine, "step", fail)
    setting = bench_gpu_training.Setting(1, 0, 0.0)
    row = bench.measure(setting)
    assert row == {"failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate / much"}
    assert bench_gpu_training.row_of(setting, row)[1] == row["failed"]
    bench.until = 0
    assert "--seconds" in bench.measure(setting)["failed"]


def test_the_figures_of_a_setting_belong_together() -> None:
    bench = bench_gpu_training.Bench(bench_gpu_training._options(ON_CPU), torch.device("cpu"))
    bench.peak, bench.matmul = 1e15, 5e14
    row = bench.measure(bench_gpu_training.Setting(3, 1, 0.0))
    samples = 3 * 2
    assert row["tokens"] == pytest.approx(samples * 512 / row["seconds"])
    assert row["tflops"] == pytest.approx(samples * bench.flops / row["seconds"] / 1e12)
    assert row["mfu"] == pytest.approx(row["tflops"] / 10) and row["of matmul"] == pytest.approx(
        2 * row["mfu"]
    )
    # 6 FLOPs a parameter and token, without the two tables, with attention and the logits of the codes.
    inside = sum(p.numel() for p in bench.engine.model.transformer.layers.parameters() if p.ndim == 2)
    attention, head = 2 * 4 * 512**2 * 32, 2 * 400 * 200 * 32
    assert bench.flops == 6 * 512 * inside + 3 * (attention + head)


def test_masters_learn_what_low_precision_weights_cannot() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = gpu_engines.MasterAdamW([[weight]])
    reference = nn.Parameter(torch.ones(4))
    plain = torch.optim.AdamW([reference], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
    for _ in range(30):
        weight.grad = torch.full((4,), 0.5, dtype=torch.bfloat16)
        reference.grad = torch.full((4,), 0.5)
        optimizer.step()
        plain.step()
        assert weight.grad is None
    # One step of 1e-4 is lost in bf16, whose neighbours of 1 are 0.004 away; thirty are not.
    assert float(reference.detach()[0]) < 0.998 and torch.equal(weight.float(), reference.bfloat16().float())


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_recomputed_layers_keep_less_and_change_nothing(layers: int) -> None:
    torch.manual_seed(0)
    model = CogLM(config(), 60)
    batch = synthetic.samples(config(), 60, 2, 0, torch.device("cpu"))
    mask = torch.ones(2, 1, 27, 27, dtype=torch.bool).tril()
    kept, gradients = [], []
    for recomputed in (0, layers):
        gpu_engines.recompute(model, recomputed)
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(batch["tokens"], batch["position_ids"], mask)
        kept.append(sum(saved))
        model.zero_grad()
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert (kept[1] < kept[0]) == bool(layers)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_sweep_is_read_or_refused_in_a_sentence() -> None:
    found = bench_gpu_training.read_sweep("8/0/0,8/99/0.1,8/12/0.1", 12)
    assert [(one.micro_batch, one.recomputed, one.dropout) for one in found] == [(8, 0, 0.0), (8, 12, 0.1)]
    with pytest.raises(SystemExit, match="MICRO_BATCH/RECOMPUTED_LAYERS/DROPOUT"):
        bench_gpu_training.read_sweep("8/0", 12)


@pytest.mark.parametrize(("memory", "layers"), [(150e9, 48), (84e9, 30), (8e9, 0)])
def test_the_largest_model_that_fits(memory: float, layers: int) -> None:
    options = bench_gpu_training._options([])
    assert bench_gpu_training.fitting_layers(options, int(memory)) == layers


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert bench_gpu_training.main([]) == 1
        assert "needs a CUDA device" in capsys.readouterr().err
    code = "import sys; sys.modules['pydantic'] = None; sys.argv = ['x']; import bench_gpu_training"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "needs the package pydantic" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_the_gpu_benchmark_over_the_projects_engine() -> None:
    arguments = [word if word != "bare" else "deepspeed" for word in ON_CPU]
    argv = [sys.executable, str(FOLDER / "bench_gpu_training.py"), *arguments, "--sweep", "1/1/0"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the project's engine, ZeRO-1" in done.stdout and "| sdpa |" in done.stdout
