"""From the SIGKILL of a job to its first new step: ours through `cogview2 run`, beside a bare DeepSpeed loop.

Both train a CogLM of the quickstart recipe's size on 2 ranks with ZeRO 1, and save after every step. All processes of a
job, its launchers included, are killed at a random moment up to half a second after a new step, and the same command is
given at once. A new step is one that the job had not made before. The sides take turns in blocks of kills.

The parts: `processes` until rank 0 has imported what it needs (launchers included), `engine` until the state is looked for
(process group, model, optimizer; libraries that they import late), `restore` (ours: clean-up, verification and loading),
`steps` until the new one.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from killed_jobs import Kill, LostError, Side

sys.path.append(str(Path(__file__).resolve().parents[1] / "local_attention"))
import measure  # noqa: E402
import report  # noqa: E402

OURS, BARE = "ours, cogview2 run", "bare DeepSpeed"
PARTS = ("processes", "engine", "restore", "steps")
_KEYS = {
    "launch.ranks": 2,
    "launch.threads_per_rank": 1,
    "data.drawings.count": 64,
    "data.held_out": 8,
    "tokenizer.input_sentences": 200,
    "tokenizer.seed_pieces": 2000,
    "vqvae.model.latent_channels": 8,
    "vqvae.model.codebook_size": 32,
    "vqvae.autoencoder_steps": 2,
    "vqvae.restart_after": 2,
    "vqvae.train.optimizer.warmup_steps": 1,
    "vqvae.train.steps": 2,
    "shards.samples_per_shard": 8,
    "coglm.train.steps": 1_000_000,
    "coglm.train.log_every": 1,
    "coglm.train.sample_every": 0,
    "coglm.train.checkpoint.every_steps": 1,
    "coglm.train.optimizer.kind": "adamw",
}


class Ours(Side):
    """One training stage of a run, through the command line."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, OURS)
        self._json = folder / "zero1.json"
        content = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 1}}
        self._json.write_text(json.dumps(content))
        self._stage = folder / "runs" / "recovery" / "stages" / "pretrain_coglm"
        self._before = 0

    def _run(self, stages: str) -> list[str]:
        keys = {"vqvae.train.deepspeed": "tiny_zero0", "coglm.train.deepspeed": str(self._json)} | _KEYS
        sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        where = ["--name", "recovery", "--runs-dir", str(self.folder / "runs"), "--stages", stages]
        return [sys.executable, "-m", "cogview2.launch.cli", "run", "quickstart", *where, *sets]

    def prepare(self) -> None:
        """Make what the stage reads."""
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        code = subprocess.run(
            self._run("..shard_dataset"), env=environment, stdout=sys.stderr, check=False
        ).returncode
        if code:
            raise SystemExit(f"the stages before could not be made ({code}); the lines above say why")

    @property
    def command(self) -> list[str]:
        return self._run("pretrain_coglm")

    @property
    def steps(self) -> Path:
        return self._stage / "metrics.jsonl"

    def _attempts(self) -> list[Path]:
        return sorted((self._stage / "attempts").glob("[0-9]*"))

    def renew(self) -> None:
        self._before = len(self._attempts())

    def _file(self, name: str) -> Path | None:
        new = self._attempts()[self._before :]
        return new[-1] / name if new and (new[-1] / name).exists() else None

    def began(self) -> bool:
        return self._file("rank-0.pid") is not None

    def restored(self) -> float | None:
        path = self._file("rank-0.log")
        found = re.search(r"restored in ([0-9.]+) s", path.read_text()) if path is not None else None
        return None if found is None else float(found[1])

    def begin_anew(self) -> None:
        raise SystemExit(f"a run of ours did not go on: {self._stage}")


class Bare(Side):
    """The loop of bare_recovery.py through DeepSpeed's launcher."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, BARE)
        self._own = folder / "bare"
        self._own.mkdir()

    @property
    def command(self) -> list[str]:
        script = Path(__file__).with_name("bare_recovery.py")
        launcher = ["-m", "deepspeed.launcher.runner", "--hostfile", "/dev/null", "--num_gpus", "2"]
        port = ["--master_addr", "127.0.0.1", "--master_port", str(random.randrange(20000, 30000))]
        return [sys.executable, *launcher, *port, "--no_local_rank", str(script), str(self._own)]

    @property
    def steps(self) -> Path:
        return self._own / "steps.jsonl"

    def renew(self) -> None:
        (self._own / "said.jsonl").unlink(missing_ok=True)

    def _said(self, what: str) -> Any:
        path = self._own / "said.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return next(
            (found[what] for line in lines if line.endswith("\n") and what in (found := json.loads(line))),
            None,
        )

    def began(self) -> bool:
        return bool(self._said("began"))

    def restored(self) -> float | None:
        found = self._said("restored")
        return None if found is None else float(found)

    def begin_anew(self) -> None:
        shutil.rmtree(self._own)
        self._own.mkdir()


def recover(side: Side, rng: random.Random) -> Kill:
    """Kill a job that trains, start it again, and measure until it has made a new step."""
    before = side.step()
    side.until(lambda: side.step() > before + 1, "two steps")  # the first of them is saved then
    time.sleep(rng.uniform(0, 0.5))
    newest, begin = side.step(), time.monotonic()
    side.kill()
    newest = max(newest, side.step())
    side.start()
    began = side.until(side.began, "rank 0 to begin")
    done = side.until(lambda: side.restored() is not None, "the restored state")
    new = side.until(lambda: side.step() > newest, "a new step")
    restore = side.restored() or 0.0
    parts = {
        "processes": began - begin,
        "engine": done - restore - began,
        "restore": restore,
        "steps": new - done,
    }
    return Kill(new - begin, parts)


def block(side: Side, kills: int, rng: random.Random) -> None:
    """Start a job, let it recover `kills` times, and kill it."""
    side.start()
    try:
        for _ in range(kills):
            try:
                side.kills.append(recover(side, rng))
                print(f"{side.name}: {side.kills[-1].seconds:.2f} s", file=sys.stderr, flush=True)
            except LostError as error:
                print(f"{side.name}: lost, {error}", file=sys.stderr, flush=True)
                side.lost += 1
                side.kill()
                side.begin_anew()
                side.start()
    finally:
        side.kill()


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def rows(sides: Sequence[Side]) -> list[list[Any]]:
    """Return the table: one row for each side, the peer's median being 1."""
    median = {side.name: statistics.median(kill.seconds for kill in side.kills) for side in sides}
    return [
        [
            side.name,
            len(side.kills) + side.lost,
            side.lost,
            median[side.name],
            percentile([kill.seconds for kill in side.kills], 0.95),
            f"{median[side.name] / median[BARE]:.2f}x",
            *(statistics.median(kill.parts[part] for kill in side.kills) for part in PARTS),
        ]
        for side in sides
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=15, help="of each side")
    parser.add_argument("--blocks", type=int, default=1, help="turns that the sides take")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the runs are (default: a temporary folder)")
    parser.add_argument("--results", type=Path, help="a RESULTS.md whose section 'recovery' is replaced")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    options = parser.parse_args(arguments)
    if options.kills % options.blocks:
        parser.error(
            f"--kills {options.kills} is no multiple of --blocks {options.blocks}; choose one that is"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    facts = measure.environment(torch.device("cpu"))
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ours, bare = Ours(Path(folder)), Bare(Path(folder))
        ours.prepare()
        for _ in range(options.blocks):
            for side in (bare, ours):
                block(side, options.kills // options.blocks, rng)
    head = ["job", "kills", "lost", "p50 s", "p95 s", "of bare", *(f"{part} s" for part in PARTS)]
    parts = [
        report.facts_table(facts),
        "### SIGKILL to the first new step, 2 ranks, ZeRO 1, CogLM of 3 layers of 128",
        report.table(head, rows([bare, ours])),
        "`lost`: the job could not go on by the same command. The parts are medians of their own.",
    ]
    record = {
        side.name: {"lost": side.lost, "kills": [vars(kill) for kill in side.kills]} for side in (bare, ours)
    }
    report.publish(
        "\n\n".join(parts), {"environment": facts, "sides": record}, "recovery", options.results, options.json
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
