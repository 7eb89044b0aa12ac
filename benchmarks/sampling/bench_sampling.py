"""Time of base sampling on the CPU against loops of plain PyTorch, in one process, taking turns.

The model has 12 layers of 512 and random weights: speed does not depend on what is drawn. Seconds are process CPU
time with one thread, else wall time; medians of the turns, and ratios of one run count, not milliseconds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import loops
import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.sampling import AutoregressiveSamplingConfig
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling.autoregressive import sample_base_codes
from cogview2.pipeline.sampling.noise import batch_uniforms
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

sys.path.append(str(Path(__file__).resolve().parents[1] / "local_attention"))
import measure  # noqa: E402
import report  # noqa: E402

Call = Callable[[], object]
MIXED = 16
NAMES = ("alone", "eight", "mixed", "concatenating")


class Case:
    """One model, its prompts and its clusters, and each way to sample from it as a call."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.vocabulary = Vocabulary.uniform(options.codes, 2000)
        self.config = CogLMConfig(
            layers=options.layers, hidden=options.hidden, heads=options.heads, dropout=0.0, max_positions=1024
        )
        self.model = CogLM(self.config, self.vocabulary.rows).eval()
        self.plain = loops.Plain(self.model.state_dict(), self.config, options.codes)
        self.grid, self.sampling = options.grid, AutoregressiveSamplingConfig()
        self.labels = torch.randint(0, options.clusters, (options.codes,))
        self.labels[: options.clusters] = torch.arange(options.clusters)

    def prompt(self, length: int, chinese: bool = False) -> list[int]:
        low, high = self.vocabulary.chinese if chinese else self.vocabulary.english
        return torch.randint(low, high, (length,)).tolist()

    def mixed(self) -> list[list[int]]:
        """Sixteen prompts, English and Chinese in turn, from 1 token to all that fit."""
        longest = self.config.text_length - 1
        return [
            self.prompt(1 + round((longest - 1) * (number / (MIXED - 1)) ** 2), bool(number % 2))
            for number in range(MIXED)
        ]

    def ours(self, prompts: list[list[int]], first: int = 0) -> torch.Tensor:
        """Sample with the project's own function."""
        numbers = range(first, first + len(prompts))
        return sample_base_codes(
            self.model,
            prompts,
            batch_uniforms(0, numbers, "base", self.grid**2, 2),
            grid=self.grid,
            vocabulary=self.vocabulary,
            labels=self.labels,
            config=self.sampling,
        )

    def peer(self, loop: Callable[..., torch.Tensor], prompts: list[list[int]]) -> torch.Tensor:
        """Sample with a loop of plain functions; all prompts have one length."""
        start = self.vocabulary.start_of_image
        tokens = torch.tensor([[*prompt, start] for prompt in prompts])
        return loop(self.plain, tokens, self.grid**2, self.labels, self.sampling)


def calls_of(case: Case, names: Sequence[str], length: int) -> dict[str, Call]:
    """The candidates by name; prompts of `length` tokens where a peer takes part."""
    calls: dict[str, Call] = {}
    for batch, name in ((1, "alone"), (8, "eight")):
        if name in names:
            prompts = [case.prompt(length) for _ in range(batch)]
            calls[f"ours, batch {batch}"] = lambda prompts=prompts: case.ours(prompts)  # type: ignore[misc]
            calls[f"bare loop, batch {batch}"] = lambda prompts=prompts: case.peer(  # type: ignore[misc]
                loops.preallocated_loop, prompts
            )
    if "mixed" in names:
        mixed = case.mixed()
        calls[f"ours, {MIXED} mixed prompts together"] = lambda: case.ours(mixed)
        calls[f"ours, {MIXED} mixed prompts one by one"] = lambda: [
            case.ours([prompt], number) for number, prompt in enumerate(mixed)
        ]
    if "concatenating" in names:
        prompts = [case.prompt(length) for _ in range(8)]
        calls["concatenating loop, batch 8"] = lambda: case.peer(loops.concatenating_loop, prompts)
    return calls


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"layers": 12, "hidden": 512, "heads": 8, "grid": 20, "codes": 20_000, "clusters": 500}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3, help="of every candidate")
    parser.add_argument("--prompt-tokens", type=int, default=111, help="text tokens where a peer takes part")
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join(NAMES)}")
    parser.add_argument("--results", type=Path, help="a RESULTS.md whose section 'sampling' is replaced")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    return parser.parse_args(arguments)


def targets(seconds: dict[str, float]) -> list[report.Target]:
    """Compare with the issue's bounds what was measured."""
    together = f"ours, {MIXED} mixed prompts together"
    pairs = [
        ("time, batch 1, of the bare loop's", "ours, batch 1", "bare loop, batch 1", 1.2, 1.0, True),
        ("time, batch 8, of the bare loop's", "ours, batch 8", "bare loop, batch 8", 1.2, 1.0, True),
        (
            "speed of a mixed batch over one by one",
            f"ours, {MIXED} mixed prompts one by one",
            together,
            4,
            6,
            False,
        ),
        (
            "speed over the concatenating loop, batch 8",
            "concatenating loop, batch 8",
            "ours, batch 8",
            1,
            4,
            False,
        ),
    ]
    return [
        report.Target(title, seconds[upper] / seconds[lower], least, aim, at_most=at_most)
        for title, upper, lower, least, aim, at_most in pairs
        if upper in seconds and lower in seconds
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    names = [name.strip() for name in options.only.split(",") if name.strip()] or list(NAMES)
    if unknown := set(names) - set(NAMES):
        raise SystemExit(f"--only: unknown {sorted(unknown)}; choose from {', '.join(NAMES)}")
    case = Case(options)
    calls = calls_of(case, names, options.prompt_tokens)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.turns):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
            print(f"{name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    codes = options.grid**2
    pictures = {name: MIXED if "mixed" in name else int(name.rpartition(" ")[2]) for name in seconds}
    rows = [
        [
            name,
            value,
            1000 * value / codes / (pictures[name] if "one by one" in name else 1),
            pictures[name] * codes / value,
        ]
        for name, value in seconds.items()
    ]
    head = ("candidate", "seconds", "ms per model run", "codes per second")
    facts = measure.environment(torch.device("cpu")) | {"threads": str(options.threads)}
    size = f"{options.layers} layers, {options.hidden} hidden, {options.heads} heads, {codes} codes of {options.codes}"
    parts = [
        report.facts_table(facts),
        f"### {size}",
        report.table(head, rows),
        report.targets_table(targets(seconds)),
    ]
    report.publish(
        "\n\n".join(parts),
        {"environment": facts, "seconds": times},
        "sampling",
        options.results,
        options.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
