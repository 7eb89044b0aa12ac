"""Stage shard_dataset, killed after its first shards and started again, writes the same bytes."""

from pathlib import Path

import pytest
from tiny_runs import Finished, Ranks, copy, digests, run_stage

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_killed_and_started_again(finished_run: Finished, tmp_path: Path) -> None:
    run = copy(finished_run.run, tmp_path / "run", until="train_vqvae")
    progress, output = (
        run.stage("shard_dataset").path / "progress" / "train",
        run.stage("shard_dataset").output,
    )
    Ranks(run, "shard_dataset").when(lambda: len(list(progress.glob("*.json"))) >= 2).kill()
    assert run.stage("shard_dataset").done() is None and not (output / "train" / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (output / "train").glob("train-00000[01].tar")}
    run_stage(run, "shard_dataset", ranks=2)
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == moment for path, moment in kept.items())
    assert digests(output) == digests(finished_run.run.stage("shard_dataset").output)
