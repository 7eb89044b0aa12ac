"""The benchmark of base sampling: its loops do the same work as the project's models, and it prints its ratios."""

import json
import sys
from pathlib import Path

import pytest
import torch
from cluster_distribution import cluster_distribution

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.sampling import AutoregressiveSamplingConfig
from cogview2.pipeline.models.coglm.model import CogLM

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks/sampling"))

import bench_sampling  # noqa: E402
import loops  # noqa: E402

QUICK = [
    "--layers",
    "1",
    "--hidden",
    "32",
    "--heads",
    "2",
    "--grid",
    "2",
    "--codes",
    "60",
    "--clusters",
    "20",
]


@pytest.mark.parametrize("loop", [loops.preallocated_loop, loops.concatenating_loop])
def test_the_loops_compute_the_published_sequence(loop: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token's logits equal those of CogLM over the whole sequence with its mask and W."""
    torch.manual_seed(0)
    config = CogLMConfig(
        layers=2, hidden=32, heads=2, dropout=0.0, max_positions=40, text_length=8, image_position=10
    )
    model = CogLM(config, 60).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    seen: list[torch.Tensor] = []

    def note(logits: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append(logits)
        return logits.argmax(1, keepdim=True)

    monkeypatch.setattr(loops, "draw_straight", note)
    prompts = torch.randint(30, 59, (2, 6))
    plain = loops.Plain(model.state_dict(), config, 30)
    sampling = AutoregressiveSamplingConfig(text_attention_bias=1.4)
    codes = loop(plain, prompts, 5, torch.arange(30) % 4, sampling)  # type: ignore[operator]
    tokens = torch.cat([prompts, codes[:, :-1]], dim=1)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    mask[:, :5] = True
    bias = torch.zeros(1, 10)
    bias[:, :5] = 1.4
    positions = torch.tensor([[*range(5), *range(10, 15)]]).expand(2, -1)
    with torch.no_grad():
        hidden = model(tokens, positions, mask[None, None], attention_bias=bias)
    torch.testing.assert_close(
        torch.stack(seen, dim=1), model.logits(hidden, 30)[:, 5:], atol=2e-5, rtol=1e-5
    )


def test_straight_sampling_draws_what_can_be_drawn() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 30).expand(4000, -1) * 2, torch.arange(30) % 7
    config = AutoregressiveSamplingConfig(top_k_clusters=3)
    drawn = loops.draw_straight(logits.clone(), labels, 7, config)[:, 0]
    chances = cluster_distribution(logits[0], labels, 1.15, 3, 1.0)
    shares = torch.bincount(drawn, minlength=30) / 4000
    assert (shares - chances).abs().max() < 0.05


def test_the_benchmark_prints_its_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    results = tmp_path / "RESULTS.md"
    results.write_text("top\n<!-- sampling -->\nold\n<!-- end of sampling -->\nend\n")
    try:
        arguments = [*QUICK, "--turns", "1", "--results", str(results), "--json", str(tmp_path / "s.json")]
        assert bench_sampling.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert (
        "| time, batch 1, of the bare loop's |" in printed
        and "| ours, 16 mixed prompts together |" in printed
    )
    assert "speed of a mixed batch over one by one" in results.read_text()
    seconds = json.loads((tmp_path / "s.json").read_text())["seconds"]
    assert len(seconds) == 7 and all(len(values) == 1 and values[0] > 0 for values in seconds.values())
    with pytest.raises(SystemExit, match="unknown"):
        bench_sampling.main([*QUICK, "--only", "nothing"])


def test_mixed_prompts_are_mixed() -> None:
    case = bench_sampling.Case(bench_sampling._options(QUICK))
    prompts = case.mixed()
    assert len(prompts) == 16 and len(prompts[0]) == 1 and len(prompts[-1]) == 111
    assert [case.vocabulary.language_of(prompt) for prompt in prompts[:2]] == ["en", "zh"]
