"""A disk that gets full under one rank of a stage: all ranks leave at once, with one sentence, and a rerun ends the work."""

import time
from pathlib import Path

import pytest
from tiny_runs import Finished, Ranks, copy, digests, run_stage

from cogview2.pipeline.errors import ExitCode

pytestmark = pytest.mark.distributed
LIMIT_SECONDS = 10.0
SHARDS_BEFORE = 3


@pytest.mark.parametrize("action", ["enospc", pytest.param("erofs", marks=pytest.mark.slow)])
def test_shard_dataset(
    finished_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    run = copy(finished_run.run, tmp_path / "run", until="train_vqvae")
    stage = run.stage("shard_dataset")
    monkeypatch.setenv("COGVIEW2_TEST_FAULTS", "1")
    # Each shard is synced three times: tar, index, record.
    monkeypatch.setenv("COGVIEW2_FAULT", f"fsops.fsync:{action}:rank=1:n={3 * SHARDS_BEFORE + 1}")
    ranks = Ranks(run, "shard_dataset", 2)
    ranks.when(lambda: any(ranks.attempt.path.glob("outcome-rank-1.json")))
    begin = time.monotonic()
    codes = ranks.wait()
    assert time.monotonic() - begin < LIMIT_SECONDS
    assert codes[1] == ExitCode.CANNOT_WRITE and codes[0] != 0
    failure = ranks.attempt.first_failure()
    assert failure is not None and failure.rank == 1 and failure.code == ExitCode.CANNOT_WRITE
    assert "cannot write" in failure.message and "\n" not in failure.message
    peer = ranks.attempt.outcome(0)
    assert peer is not None and peer.message.startswith("rank 1 (host ") and failure.message in peer.message
    for rank in (0, 1):
        log = ranks.attempt.rank_log(rank).read_text()
        assert "Traceback" not in log and log.count("ERROR") == log.count(failure.message) == 1, log
    assert stage.done() is None and not (stage.output / "train" / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (stage.output / "train").glob("*.tar")}
    assert len(kept) >= SHARDS_BEFORE and not list(stage.output.rglob(".*"))

    monkeypatch.delenv("COGVIEW2_FAULT")
    run_stage(run, "shard_dataset", ranks=2)
    assert all(path.stat().st_mtime_ns == moment for path, moment in kept.items())
    assert digests(stage.output) == digests(finished_run.run.stage("shard_dataset").output)
